//! Runs compilers: several at once, only for what changed, and keeps what they say for when they fail.
//!
//! Beside each object `name.o` lie `name.d` (the files it was made from, written by the compiler) and `name.cmd`
//! (the command, written before it ran). An object is fresh while its command is the same and nothing it was
//! made from is newer than the start of that command. A lock keeps two builds from sharing a folder at once.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

/// A compiler and its flags; makes one object a source.
pub struct Compiler {
    pub program: PathBuf,
    pub flags: Vec<OsString>,
    /// Flags for one source more.
    pub flags_of: fn(&Path) -> Vec<OsString>,
    /// Whether it is clang, or something that passes `-Xclang` on.
    pub is_clang: bool,
    /// Where objects go: see [`environment::object_folder`](crate::environment::object_folder).
    pub folder: PathBuf,
    /// A line of the compiler's output that makes its success a failure, if it has one.
    pub refuse: fn(&str) -> bool,
}

/// One run of a compiler, which writes `name.o` and `name.d`, where the name is the source's.
struct Job<'a> {
    compiler: &'a Compiler,
    source: &'a Path,
    object: PathBuf,
}

impl Job<'_> {
    fn arguments(&self) -> Vec<OsString> {
        let mut arguments = self.compiler.flags.clone();
        arguments.extend((self.compiler.flags_of)(self.source));
        let dependencies = self.object.with_extension("d");
        if self.compiler.is_clang {
            // The front end's own flags: zig's driver takes -MF and writes nothing.
            for word in ["-dependency-file".into(), dependencies, "-MT".into(), self.object.clone()] {
                arguments.extend(["-Xclang".into(), word.into_os_string()]);
            }
        } else {
            arguments.extend(["-MD".into(), "-MF".into(), dependencies.into()]);
        }
        arguments.extend(["-c".into(), self.source.into(), "-o".into(), self.object.clone().into()]);
        arguments
    }

    fn command_line(&self) -> String {
        let words = self.arguments();
        let words = words.iter().map(|word| word.to_string_lossy());
        format!("{} {}", self.compiler.program.display(), words.collect::<Vec<_>>().join(" "))
    }

    fn is_fresh(&self) -> bool {
        let record = self.object.with_extension("cmd");
        let Some(started) = modified(&record) else { return false };
        let Ok(dependencies) = fs::read_to_string(self.object.with_extension("d")) else { return false };
        let dependencies = parse_dependencies(&dependencies);
        self.object.is_file()
            && !dependencies.is_empty()
            && fs::read_to_string(&record).is_ok_and(|command| command == self.command_line())
            && dependencies.iter().all(|file| modified(file).is_some_and(|time| time < started))
    }

    fn run(&self) -> Result<(), String> {
        if self.is_fresh() {
            return Ok(());
        }
        // The object goes first: an interrupted run must not leave an old one with a new record.
        let _ = fs::remove_file(&self.object);
        fs::write(self.object.with_extension("cmd"), self.command_line())
            .map_err(|error| format!("{}: {error}", self.object.display()))?;
        let output = Command::new(&self.compiler.program)
            .args(self.arguments())
            .output()
            .map_err(|error| format!("{} cannot be run: {error}", self.compiler.program.display()))?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() && !said.lines().any(self.compiler.refuse) {
            for line in said.lines() {
                println!("cargo::warning={line}");
            }
            return Ok(());
        }
        let _ = fs::remove_file(&self.object);
        let source = self.source.display();
        // An assembler that dislikes an instruction says so for each of its uses.
        const SHOWN: usize = 40;
        let lines = said.lines().count();
        let mut said = said.lines().take(SHOWN).fold(String::new(), |text, line| text + line + "\n");
        if lines > SHOWN {
            said += &format!("... and {} lines more\n", lines - SHOWN);
        }
        Err(format!("{source} does not compile ({}):\n{said}by {}", output.status, self.command_line()))
    }
}

fn modified(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).ok()?.modified().ok()
}

/// The prerequisites of a make rule: `name.o : a.cu b.h \` and so on. A backslash before a space keeps it.
pub fn parse_dependencies(rule: &str) -> Vec<PathBuf> {
    let rule = rule.replace("\\\n", " ").replace("\\ ", "\0");
    let Some((_, files)) = rule.split_once(": ") else { return Vec::new() };
    files.split_whitespace().map(|file| PathBuf::from(file.replace('\0', " "))).collect()
}

/// Compiles all sources, `jobs` at a time, and answers their objects. Every failure is reported, not just the first.
pub fn compile(compiler: &Compiler, sources: &[PathBuf], jobs: usize) -> Result<Vec<PathBuf>, String> {
    Ok(compile_by_each(std::slice::from_ref(compiler), sources, jobs)?.remove(0))
}

/// All sources by each of several compilers, and the objects of each. In one queue: nobody waits for one's last source
/// before another begins.
pub fn compile_by_each(compilers: &[Compiler], sources: &[PathBuf], jobs: usize) -> Result<Vec<Vec<PathBuf>>, String> {
    // In one order everywhere, or two builds might wait for each other.
    let folders: BTreeSet<&PathBuf> = compilers.iter().map(|compiler| &compiler.folder).collect();
    let mut locks = Vec::new();
    for folder in folders {
        let file = folder.join("lock");
        let lock = fs::File::create(&file).and_then(|lock| lock.lock().map(|()| lock));
        locks.push(lock.map_err(|error| format!("{}: {error}", file.display()))?);
    }
    let job = |compiler, source| Job { compiler, source, object: object_of(compiler, source) };
    let all: Vec<Job> =
        compilers.iter().flat_map(|compiler| sources.iter().map(move |source| job(compiler, source))).collect();
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(all.len()) {
            scope.spawn(|| {
                while let Some(job) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(message) = job.run() {
                        failures.lock().expect("no holder panics").push(message);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no holder panics");
    if !failures.is_empty() {
        return Err(failures.join("\n"));
    }
    let mut objects = all.into_iter().map(|job| job.object);
    Ok(compilers.iter().map(|_| objects.by_ref().take(sources.len()).collect()).collect())
}

fn object_of(compiler: &Compiler, source: &Path) -> PathBuf {
    compiler.folder.join(source.file_name().unwrap_or_default()).with_extension("o")
}

/// Puts the objects in a static library and links the crate with it.
pub fn archive(name: &str, objects: &[PathBuf]) -> Result<(), String> {
    let mut library = cc::Build::new();
    library.cargo_warnings(false).cpp_link_stdlib(None).objects(objects);
    library.try_compile(name).map_err(|error| format!("lib{name}.a cannot be made: {error}"))
}

/// The files in a folder of csrc/ or testing/ that end in `.extension`, sorted.
pub fn sources(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("{}: {error}", folder.display())),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| format!("{}: {error}", folder.display()))?.path();
        if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
