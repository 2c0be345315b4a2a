//! The format in which the HIP runtime takes code for several architectures, uncompressed:
//!
//! ```text
//! "__CLANG_OFFLOAD_BUNDLE__"  24 bytes
//! entries                     u64
//! for each entry              offset u64, size u64, length of its name u64, name
//! ..                          the code objects, each from a multiple of 4096 on
//! ```
//! The first entry is the host's and empty. A name is `hipv4-amdgcn-amd-amdhsa--gfx942`.

use std::fs;
use std::path::Path;

const MAGIC: &[u8] = b"__CLANG_OFFLOAD_BUNDLE__";
/// What the runtime maps from: a page.
const ALIGNMENT: usize = 4096;

/// Bundles the code objects in these files, each with its architecture.
pub fn bundle(host: &str, parts: &[(&str, &Path)]) -> Result<Vec<u8>, String> {
    let mut entries = vec![(format!("host-{host}-"), Vec::new())];
    for (arch, file) in parts {
        let code = fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
        entries.push((format!("hipv4-amdgcn-amd-amdhsa--{arch}"), code));
    }
    let header: usize = MAGIC.len() + 8 + entries.iter().map(|(name, _)| 24 + name.len()).sum::<usize>();
    let mut bytes = MAGIC.to_vec();
    bytes.extend((entries.len() as u64).to_le_bytes());
    let mut offset = header.next_multiple_of(ALIGNMENT);
    for (name, code) in &entries {
        bytes.extend((offset as u64).to_le_bytes());
        bytes.extend((code.len() as u64).to_le_bytes());
        bytes.extend((name.len() as u64).to_le_bytes());
        bytes.extend(name.as_bytes());
        offset = (offset + code.len()).next_multiple_of(ALIGNMENT);
    }
    for (_, code) in &entries {
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes.extend(code);
    }
    Ok(bytes)
}
