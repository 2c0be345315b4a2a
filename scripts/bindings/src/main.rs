//! `bindings HEADER CFG ARGUMENTS..`: the Rust declarations of one C header, on stdout.
//!
//! Only what that header itself declares. Functions are declared under `cfg(CFG)`, because a build without
//! kernels (see build.rs) has none to link with; structs and constants are always there.

use std::env;
use std::path::Path;
use std::process::ExitCode;

/// Takes the rules around section titles away.
#[derive(Debug)]
struct Comments;

impl bindgen::callbacks::ParseCallbacks for Comments {
    fn process_comment(&self, comment: &str) -> Option<String> {
        Some(comment.trim_matches([' ', '-']).to_owned())
    }
}

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let (Some(header), Some(cfg)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: bindings HEADER CFG ARGUMENTS_OF_CLANG..");
        return ExitCode::from(2);
    };
    let name = Path::new(&header).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let generated = bindgen::Builder::default()
        .header(&header)
        .clang_args(["-std=c11", "-fparse-all-comments"])
        .clang_args(arguments)
        .allowlist_file(format!(".*/{name}"))
        .allowlist_recursively(false)
        .blocklist_item("QUANTKV_H|QUANTKV_DECODER_H")
        .rust_target(bindgen::RustTarget::stable(89, 0).expect("bindgen knows this release"))
        .rust_edition(bindgen::RustEdition::Edition2024)
        .use_core()
        .prepend_enum_name(false)
        .derive_default(true)
        .merge_extern_blocks(true)
        .disable_header_comment()
        .parse_callbacks(Box::new(Comments))
        .formatter(bindgen::Formatter::None)
        .generate();
    let bindings = match generated {
        Ok(bindings) => bindings.to_string(),
        Err(error) => {
            eprintln!("{header}: {error}");
            return ExitCode::FAILURE;
        }
    };
    // Enumerators are `int` in C, as are the fields and results that hold them.
    let signed = bindings.replace("= :: core :: ffi :: c_uint ;", "= :: core :: ffi :: c_int ;");
    print!("{}", signed.replace("unsafe extern \"C\"", &format!("#[cfg({cfg})] unsafe extern \"C\"")));
    ExitCode::SUCCESS
}
