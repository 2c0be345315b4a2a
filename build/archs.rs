//! Which architectures the kernels are compiled for.
//!
//! A list as of `QUANTKV_CUDA_ARCHS` has words like `80` (code for sm_80 and its minor successors), `90a` (code
//! that may use what only sm_90 has) and `compute_100` (PTX: the driver compiles it for sm_100 and anything newer
//! that the list has no code for).

use std::fmt;

/// Everything an nvcc 13 can run on. The PTX is for what comes after, and between.
pub const DEFAULT: &str = "75 80 89 90a 100 120 compute_100";

/// The same for an nvcc older than 12.8, which does not know sm_100.
pub const DEFAULT_UP_TO_90: &str = "75 80 89 90a compute_90";

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
}

/// The flags of nvcc that put this code into the object.
///
/// The compiler's first half runs once for each virtual architecture, and takes more than half of the time. The sources
/// tell sm_100 and what is newer apart no further (core/platform.h), so those share the oldest of theirs.
pub fn flags(archs: &[Arch]) -> Vec<String> {
    let common = archs.iter().filter(|arch| arch.suffix.is_empty() && arch.number >= 100).map(|arch| arch.number).min();
    let mut groups: Vec<(String, Vec<String>)> = Vec::new();
    for arch in archs {
        let own = format!("{}{}", arch.number, arch.suffix);
        let of = match common {
            Some(common) if !arch.ptx && arch.suffix.is_empty() && arch.number >= 100 => common.to_string(),
            _ => own.clone(),
        };
        let code = if arch.ptx { format!("compute_{own}") } else { format!("sm_{own}") };
        match groups.iter_mut().find(|(number, _)| *number == of) {
            Some((_, codes)) => codes.push(code),
            None => groups.push((of, vec![code])),
        }
    }
    let flag = |(of, codes): &(String, Vec<String>)| format!("-gencode=arch=compute_{of},code=[{}]", codes.join(","));
    groups.iter().map(flag).collect()
}

/// What to compile for, given what the user wants and what nvcc has. `known` holds base numbers: 75, 80, ...
///
/// `QUANTKV_CUDA_ARCHS` (`list`) is taken as it is. `CUDA_COMPUTE_CAP` (`capability`) names the one device to
/// run on, so from sm_90 on its own instructions are allowed. With neither, the default without what this nvcc does
/// not know.
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
        let default = if known.contains(&100) { DEFAULT } else { DEFAULT_UP_TO_90 };
        archs.extend(words(default).iter().filter_map(|word| parse("the default", word).ok()));
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
