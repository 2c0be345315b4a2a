//! Retargets device code for AMD's GPUs to x86-64, so that it runs where there is no GPU: LLVM IR (text) in, LLVM IR out.
//!
//!     retarget gfx942 kernels.ll kernels.x86.ll
//!
//! The IR is what clang made of csrc/hip/*.hip for that device: the preprocessor's branches, the builtins, the wave
//! width and the optimizer's work are the device's. What is exchanged:
//!
//! ```text
//! triple, data layout, features       x86-64's
//! address spaces                      one: pointers of all kinds become `ptr`
//! llvm.amdgcn.x.y(..)                 amd_x_y(..), of machine.cpp and instructions.cpp; those that lanes do together get
//!                                     one argument more, the number of the call: lanes meet at the same one
//! mfma and wmma                       the fragments go to machine.cpp through memory: x86-64 passes no such vectors
//! local data share                    globals, listed by kernel: machine.cpp fills them with NaN before each block
//! amdgpu_kernel k(byref(T) ptr)       a function, and a thunk that takes addresses of its arguments
//! ```
//! What it does not know it refuses, by name: a wrong translation must not pass for a right one.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::{env, fs};

/// Intrinsics that depend on the lane alone, or on nothing.
const OF_LANE: [&str; 17] = [
    "implicitarg.ptr",
    "workitem.id.x",
    "workgroup.id.x",
    "workgroup.id.y",
    "workgroup.id.z",
    "mbcnt.lo",
    "mbcnt.hi",
    "exp2.f32",
    "log.f32",
    "rcp.f32",
    "rsq.f32",
    "sqrt.f32",
    "perm",
    "cvt.pk.f32.fp8",
    "cvt.pk.fp8.f32",
    "cvt.pk.bf8.f32",
    "fmed3.f32",
];
/// Intrinsics that lanes do together.
const TOGETHER: [&str; 7] = [
    "ds.bpermute",
    "ballot.i64",
    "ballot.i32",
    "s.barrier",
    "wave.barrier",
    "readfirstlane",
    "readfirstlane.i32", // as newer compilers have it
];
/// Products of matrices: the name's start, and whether the terms are bf16.
const PRODUCTS: [(&str, bool); 4] = [
    ("mfma.f32.16x16x16f16", false),
    ("mfma.f32.16x16x16bf16.1k", true),
    ("wmma.f32.16x16x16.f16.v8f32.", false),
    ("wmma.f32.16x16x16.bf16.v8f32.", true),
];

const LAYOUT: &str = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    let [_, arch, input, output] = &arguments[..] else {
        eprintln!("usage: retarget ARCH IN.ll OUT.ll");
        return ExitCode::from(2);
    };
    let result = fs::read_to_string(input)
        .map_err(|error| error.to_string())
        .and_then(|text| retarget(&text, arch))
        .and_then(|text| fs::write(output, text).map_err(|error| error.to_string()));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("retarget: {input}: {why}");
            ExitCode::FAILURE
        }
    }
}

/// A kernel as its thunk calls it.
struct Kernel {
    name: String,
    /// The type of each parameter; true if it is passed by reference.
    parameters: Vec<(String, bool)>,
    shared: BTreeSet<String>,
    /// Whether it uses the launch's dynamic shared memory.
    is_dynamic: bool,
}

/// machine.cpp's, who knows how long it is at each launch.
const DYNAMIC: &str = "@amd_dynamic_shared";

fn retarget(text: &str, arch: &str) -> Result<String, String> {
    if !text.contains(&format!("\"target-cpu\"=\"{arch}\"")) && text.contains("amdgpu_kernel") {
        return Err(format!("this is not code for {arch}"));
    }
    let mut out = Vec::new();
    let mut kernels: Vec<Kernel> = Vec::new();
    let mut shared: BTreeMap<String, String> = BTreeMap::new(); // name to type
    let mut dynamic: Vec<String> = Vec::new();
    let mut declared = BTreeSet::new();
    let mut calls = 0;
    for line in text.lines() {
        if line.starts_with("target datalayout") {
            out.push(format!("target datalayout = \"{LAYOUT}\""));
            continue;
        }
        if line.starts_with("target triple") {
            out.push("target triple = \"x86_64-unknown-linux-gnu\"".to_owned());
            continue;
        }
        if line.starts_with("@llvm.") || line.starts_with("@__hip_cuid") {
            continue;
        }
        if line.starts_with("attributes #") {
            out.push(keep_attributes(line));
            continue;
        }
        if line.starts_with('@') && line.contains("addrspace(3)") {
            let (name, kind) = shared_variable(line)?;
            match kind {
                Some(kind) => {
                    out.push(format!("{name} = internal global {kind} zeroinitializer, align 128"));
                    shared.insert(name, kind);
                }
                None => dynamic.push(name),
            }
            continue;
        }
        let mut line = without_address_spaces(line);
        for name in &dynamic {
            line = line.replace(name.as_str(), DYNAMIC);
        }
        if line.contains("@llvm.amdgcn.mfma.") || line.contains("@llvm.amdgcn.wmma.") {
            out.extend(product(&line, &mut calls)?);
            continue;
        }
        line = intrinsics(&line, &mut calls)?;
        if line.starts_with("declare ") && !declared.insert(line.clone()) {
            continue; // two that differed by their address spaces
        }
        if line.starts_with("define ") && line.contains("amdgpu_kernel") {
            let (kernel, definition) = kernel_definition(&line)?;
            kernels.push(kernel);
            line = definition;
        } else if line.starts_with("define ") {
            return Err(format!("a function that is not a kernel was not inlined: {line}"));
        }
        if let Some(kernel) = kernels.last_mut() {
            for name in globals_of(&line) {
                if shared.contains_key(name) {
                    kernel.shared.insert(name.to_owned());
                }
                kernel.is_dynamic |= name == DYNAMIC;
            }
        }
        out.push(line);
    }
    if text.contains("ptrtoint ptr addrspace(3)") {
        return Err("an address in the local data share as a number".to_owned());
    }
    out.push(format!("{DYNAMIC} = external global [65536 x i8], align 128"));
    out.push("@amd_fragments = external global [3 x [32 x i8]], align 32".to_owned());
    out.push("declare void @amd_product(i32, i32, i1) convergent nounwind".to_owned());
    out.extend(tables(&kernels, &shared));
    Ok(out.join("\n") + "\n")
}

/// Of a group of attributes what x86 needs to know as well. `convergent`: calls that lanes make together must not be
/// moved into branches.
fn keep_attributes(line: &str) -> String {
    let head = line.split('{').next().unwrap_or_default();
    let words: Vec<&str> = line.split_whitespace().filter(|word| ["convergent", "nounwind"].contains(word)).collect();
    format!("{head}{{ {} }}", words.join(" "))
}

/// `@x = internal addrspace(3) global [4 x float] undef, align 16`: a name and a type; no type if it is the dynamic
/// memory, `external .. [0 x i8]`.
fn shared_variable(line: &str) -> Result<(String, Option<String>), String> {
    let unknown = || format!("a variable in the local data share of a kind that is not known: {line}");
    let (name, rest) = line.split_once(" = ").ok_or_else(unknown)?;
    let (head, kind) = rest.split_once("addrspace(3) global ").ok_or_else(unknown)?;
    if head.contains("external") {
        return Ok((name.to_owned(), None));
    }
    let end = [" undef", " poison"].iter().find_map(|end| kind.find(end)).ok_or_else(unknown)?;
    Ok((name.to_owned(), Some(without_address_spaces(&kind[..end]))))
}

fn without_address_spaces(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find("addrspace(") {
        let before = rest[..at].trim_end_matches(' ');
        // An alloca's, after a comma, goes with it.
        text.push_str(before.strip_suffix(',').unwrap_or(before));
        let end = rest[at..].find(')').map_or(rest.len(), |end| at + end + 1);
        rest = &rest[end..];
    }
    text.push_str(rest);
    let text = text.replace("addrspacecast", "bitcast");
    overloads(&text)
}

/// `@llvm.memcpy.p0.p4.i64` to `@llvm.memcpy.p0.p0.i64`.
fn overloads(line: &str) -> String {
    let mut line = line.to_owned();
    for space in 1..=5 {
        if line.contains("@llvm.") {
            line = line.replace(&format!(".p{space}."), ".p0.").replace(&format!(".p{space}("), ".p0(");
        }
    }
    line
}

/// Names of AMD's intrinsics become names of functions, with the number of the call where lanes meet.
fn intrinsics(line: &str, calls: &mut u32) -> Result<String, String> {
    let mut text = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find("@llvm.amdgcn.") {
        let name_from = at + "@llvm.amdgcn.".len();
        let length = rest[name_from..].find('(').ok_or_else(|| format!("an intrinsic's address: {line}"))?;
        let name = &rest[name_from..name_from + length];
        text.push_str(&rest[..at]);
        text.push_str("@amd_");
        text.push_str(&name.replace('.', "_"));
        text.push('(');
        rest = &rest[name_from + length + 1..];
        if TOGETHER.contains(&name) {
            let none = rest.starts_with(')');
            if line.starts_with("declare") {
                text.push_str("i32");
            } else {
                text.push_str(&format!("i32 {calls}"));
                *calls += 1;
            }
            text.push_str(if none { "" } else { ", " });
        } else if !OF_LANE.contains(&name) {
            return Err(format!("llvm.amdgcn.{name} is not known here: give it to retarget.rs and machine.cpp or instructions.cpp"));
        }
    }
    text.push_str(rest);
    Ok(if line.starts_with("declare") { text.replace("immarg ", "").replace(" immarg", "") } else { text })
}

/// `%5 = call <4 x float> @llvm.amdgcn.mfma..(<4 x half> %a, <4 x half> %b, <4 x float> %c, ..)`: A, B and C to
/// @amd_fragments, a call with the number of terms, and the result from where C was. No other lane runs in between.
fn product(line: &str, calls: &mut u32) -> Result<Vec<String>, String> {
    if line.starts_with("declare") {
        return Ok(Vec::new());
    }
    let unknown = || format!("a product of matrices of a kind that is not known: {line}");
    let (result, call) = line.split_once(" = ").ok_or_else(unknown)?;
    let at = call.find("@llvm.amdgcn.").ok_or_else(unknown)? + "@llvm.amdgcn.".len();
    let open = at + call[at..].find('(').ok_or_else(unknown)?;
    let close = open + matching(&call[open..]).ok_or_else(unknown)?;
    let name = &call[at..open];
    let is_bf16 = PRODUCTS
        .iter()
        .find(|(known, _)| if known.ends_with('.') { name.starts_with(known) } else { name == *known })
        .ok_or_else(unknown)?
        .1;
    let arguments = split(&call[open + 1..close]);
    // MFMA's last three arguments would shuffle blocks, or negate.
    if arguments.len() < 3 || arguments[3..].iter().any(|argument| argument != "i32 0") {
        return Err(unknown());
    }
    let kind = |argument: &str| argument[..=argument.find('>').unwrap_or(0)].to_owned();
    let terms: u32 = arguments[0].trim_start_matches('<').split(' ').next().and_then(|n| n.parse().ok()).ok_or_else(unknown)?;
    let place = |index: usize| format!("ptr getelementptr ([32 x i8], ptr @amd_fragments, i64 {index})");
    let mut out = Vec::new();
    for (index, argument) in arguments[..3].iter().enumerate() {
        out.push(format!("  store {argument}, {}, align 32", place(index)));
    }
    out.push(format!("  call void @amd_product(i32 {calls}, i32 {terms}, i1 {is_bf16})"));
    out.push(format!("{result} = load {}, {}, align 32", kind(&arguments[2]), place(2)));
    *calls += 1;
    Ok(out)
}

/// A kernel's parameters, and its definition as a plain function.
fn kernel_definition(line: &str) -> Result<(Kernel, String), String> {
    let unknown = || format!("a kernel of a form that is not known: {line}");
    let at = line.find('@').ok_or_else(unknown)?;
    let open = at + line[at..].find('(').ok_or_else(unknown)?;
    let name = line[at + 1..open].to_owned();
    let close = open + matching(&line[open..]).ok_or_else(unknown)?;
    let mut parameters = Vec::new();
    let mut list = Vec::new();
    for parameter in split(&line[open + 1..close]) {
        match parameter.find("byref(") {
            Some(from) => {
                let end = from + 5 + matching(&parameter[from + 5..]).ok_or_else(unknown)?;
                parameters.push((parameter[from + 6..end].to_owned(), true));
                list.push(format!("{}{}", &parameter[..from], &parameter[end + 1..]));
            }
            None => {
                let kind = parameter.split_whitespace().next().ok_or_else(unknown)?;
                parameters.push((kind.to_owned(), false));
                list.push(parameter);
            }
        }
    }
    let head = line[..at].replace("amdgpu_kernel ", "").replace("protected ", "").replace("local_unnamed_addr ", "");
    let tail = line[close + 1..].replace("local_unnamed_addr ", "");
    let definition = format!("{head}@{name}({}){tail}", list.join(", "));
    Ok((Kernel { name, parameters, shared: BTreeSet::new(), is_dynamic: false }, definition))
}

/// Where the parenthesis that `text` starts with closes.
fn matching(text: &str) -> Option<usize> {
    let mut depth = 0;
    let mut quoted = false;
    for (index, letter) in text.char_indices() {
        match letter {
            '"' => quoted = !quoted,
            '(' if !quoted => depth += 1,
            ')' if !quoted => {
                depth -= 1;
                if depth == 0 {
                    return Some(index);
                }
            }
            _ => {}
        }
    }
    None
}

/// The parts of a list, at the commas outside parentheses, braces and quotes.
fn split(list: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let (mut depth, mut quoted) = (0, false);
    for letter in list.chars() {
        match letter {
            '"' => quoted = !quoted,
            '(' | '{' | '[' | '<' if !quoted => depth += 1,
            ')' | '}' | ']' | '>' if !quoted => depth -= 1,
            ',' if !quoted && depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        parts.last_mut().expect("one to begin with").push(letter);
    }
    parts.into_iter().map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}

/// The names of globals in a line, with their @.
fn globals_of(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices('@').map(|(at, _)| {
        let name = &line[at + 1..];
        let length = match name.strip_prefix('"') {
            Some(quoted) => quoted.find('"').map_or(name.len(), |end| end + 2),
            None => name.find(|c: char| !(c.is_ascii_alphanumeric() || "._$-".contains(c))).unwrap_or(name.len()),
        };
        &line[at..at + 1 + length]
    })
}

/// What machine.cpp reads: a thunk and an entry for each kernel, put on its list before main.
///
/// ```text
/// entry      { name, thunk, parameters, sizes, shared variables, their addresses and sizes, uses dynamic }
/// ```
fn tables(kernels: &[Kernel], shared: &BTreeMap<String, String>) -> Vec<String> {
    let mut out = Vec::new();
    let size = |kind: &str| format!("i64 ptrtoint (ptr getelementptr ({kind}, ptr null, i32 1) to i64)");
    let mut entries = Vec::new();
    for (index, kernel) in kernels.iter().enumerate() {
        let plain = kernel.name.trim_matches('"');
        let bytes = plain.len() + 1;
        out.push(format!("@amd.name.{index} = private constant [{bytes} x i8] c\"{plain}\\00\""));
        let sizes: Vec<String> = kernel.parameters.iter().map(|(kind, _)| size(kind)).collect();
        out.push(format!("@amd.sizes.{index} = private constant [{} x i64] [{}]", sizes.len(), sizes.join(", ")));
        let rows: Vec<String> = kernel
            .shared
            .iter()
            .map(|name| format!("{{ ptr, i64 }} {{ ptr {name}, {} }}", size(&shared[name])))
            .collect();
        let row = "{ ptr, i64 }";
        out.push(format!("@amd.shared.{index} = private constant [{} x {row}] [{}]", rows.len(), rows.join(", ")));
        let dynamic = i32::from(kernel.is_dynamic);
        out.push(format!("define internal void @amd.thunk.{index}(ptr %arguments) {{"));
        let mut arguments = Vec::new();
        for (place, (kind, by_reference)) in kernel.parameters.iter().enumerate() {
            out.push(format!("  %at{place} = getelementptr ptr, ptr %arguments, i64 {place}"));
            out.push(format!("  %p{place} = load ptr, ptr %at{place}"));
            if *by_reference {
                arguments.push(format!("ptr %p{place}"));
            } else {
                out.push(format!("  %v{place} = load {kind}, ptr %p{place}"));
                arguments.push(format!("{kind} %v{place}"));
            }
        }
        out.push(format!("  call void @{}({})", kernel.name, arguments.join(", ")));
        out.push("  ret void".to_owned());
        out.push("}".to_owned());
        entries.push(format!(
            "%amd.kernel {{ ptr @amd.name.{index}, ptr @amd.thunk.{index}, i64 {}, ptr @amd.sizes.{index}, i64 {}, \
             ptr @amd.shared.{index}, i32 {dynamic} }}",
            sizes.len(),
            rows.len()
        ));
    }
    out.push("%amd.kernel = type { ptr, ptr, i64, ptr, i64, ptr, i32 }".to_owned());
    let count = entries.len();
    out.push(format!("@amd.kernels = private constant [{count} x %amd.kernel] [{}]", entries.join(", ")));
    out.push("declare void @amd_register(ptr, i64)".to_owned());
    out.push("define internal void @amd.enlist() {".to_owned());
    out.push(format!("  call void @amd_register(ptr @amd.kernels, i64 {count})"));
    out.push("  ret void\n}".to_owned());
    out.push(
        "@llvm.global_ctors = appending global [1 x { i32, ptr, ptr }] [{ i32, ptr, ptr } { i32 65535, ptr @amd.enlist, \
         ptr null }]"
            .to_owned(),
    );
    out
}

#[cfg(test)]
#[path = "retarget_tests.rs"]
mod tests;
