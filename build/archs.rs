//! Which architectures the kernels are compiled for.
//!
//! A list as of `QUANTKV_CUDA_ARCHS` has words like `80` (code for sm_80 and its minor successors), `90a` (code
//! that may use what only sm_90 has) and `compute_90` (PTX: the driver compiles it for sm_90 and anything newer
//! that the list has no code for).

use std::fmt;

/// Everything an nvcc 13 can run on; older ones know a part. The PTX is for what comes after.
pub const DEFAULT: &str = "75 80 89 90a 100a 120a compute_90";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arch {
    /// 10 * major + minor.
    pub number: u32,
    /// Empty, `a` (this device only) or `f` (its family).
    pub suffix: &'static str,
    pub ptx: bool,
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.ptx { "compute_" } else { "" };
        write!(f, "{kind}{}{}", self.number, self.suffix)
    }
}

impl Arch {
    /// `80`, `8.0`, `sm_80`, `90a`, `compute_90`.
    fn parse(word: &str) -> Option<Arch> {
        let (ptx, rest) = match word.strip_prefix("compute_") {
            Some(rest) => (true, rest),
            None => (false, word.strip_prefix("sm_").unwrap_or(word)),
        };
        let (digits, suffix) = match rest.strip_suffix('a') {
            Some(digits) => (digits, "a"),
            None => rest.strip_suffix('f').map_or((rest, ""), |digits| (digits, "f")),
        };
        let number = match digits.split_once('.') {
            Some((major, minor)) if minor.len() == 1 => format!("{major}{minor}").parse().ok()?,
            Some(_) => return None,
            None => digits.parse().ok()?,
        };
        (digits.starts_with(|c: char| c.is_ascii_digit()) && number >= 10).then_some(Arch { number, suffix, ptx })
    }

    /// The flag of nvcc that adds this code to the object.
    pub fn flag(&self) -> String {
        let virtual_arch = format!("compute_{}{}", self.number, self.suffix);
        let code = if self.ptx { virtual_arch.clone() } else { format!("sm_{}{}", self.number, self.suffix) };
        format!("-gencode=arch={virtual_arch},code={code}")
    }
}

/// What to compile for, given what the user wants and what nvcc has. `known` holds base numbers: 75, 80, ...
///
/// `QUANTKV_CUDA_ARCHS` (`list`) is taken as it is. `CUDA_COMPUTE_CAP` (`capability`) names the one device to
/// run on, so from sm_90 on its own instructions are allowed. With neither, [`DEFAULT`] without what this nvcc
/// does not know.
pub fn choose(list: Option<&str>, capability: Option<&str>, known: &[u32]) -> Result<Vec<Arch>, String> {
    let words = |text: &str| -> Vec<String> {
        text.split([',', ';', ' ']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
    };
    let parse = |variable: &str, word: &str| {
        let arch = Arch::parse(word).filter(|arch| known.contains(&arch.number));
        arch.ok_or_else(|| {
            let known = known.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
            format!(
                "{variable} names the architecture '{word}', which this nvcc does not know.\n\
                 It knows {known}; from 90 on also with an 'a' (90a), and compute_N for PTX."
            )
        })
    };
    let mut archs = Vec::new();
    if let Some(list) = list {
        for word in words(list) {
            archs.push(parse("QUANTKV_CUDA_ARCHS", &word)?);
        }
        if archs.is_empty() {
            return Err("QUANTKV_CUDA_ARCHS names no architecture; unset it for the default ones.".into());
        }
    } else if let Some(capability) = capability {
        let mut arch = parse("CUDA_COMPUTE_CAP", capability)?;
        if arch.number >= 90 && arch.suffix.is_empty() && !arch.ptx {
            arch.suffix = "a";
        }
        archs.push(arch);
    } else {
        archs.extend(words(DEFAULT).iter().filter_map(|word| parse("the default", word).ok()));
    }
    archs.sort_by_key(|arch| (arch.ptx, arch.number, arch.suffix));
    archs.dedup();
    Ok(archs)
}

/// Whether a device of sm_90 gets code made for it alone, and no other.
pub fn devices_90_run_90a(archs: &[Arch]) -> bool {
    let code_of_90 = |suffix| archs.iter().any(|arch| !arch.ptx && arch.number == 90 && arch.suffix == suffix);
    code_of_90("a") && !code_of_90("")
}

/// Whether a device of sm_90 or newer may get code made for an older one (by its PTX), which does not wait for
/// the kernel before it.
pub fn newer_devices_run_older_code(archs: &[Arch]) -> bool {
    archs.iter().any(|arch| arch.ptx && arch.number < 90)
}
