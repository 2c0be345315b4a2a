//! Runs compilers: several at once, only for what changed, and keeps what they say for when they fail.
//!
//! Beside each object `name.o` lie `name.d` (the files it was made from, written by the compiler) and `name.cmd`
//! (the command, written before it ran). An object is fresh while its command is the same and nothing it was
//! made from is newer than the start of that command.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

/// One run of a compiler. The command writes `object` and, with -MD -MF, its dependencies.
pub struct Job {
    pub source: PathBuf,
    pub object: PathBuf,
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    /// A line of the compiler's output that makes its success a failure, if it has one.
    pub refuse: fn(&str) -> bool,
}

impl Job {
    /// `program arguments.. -MD -MF name.d -c source -o name.o`, where the name is the source's.
    pub fn new(
        program: &Path,
        arguments: impl IntoIterator<Item = OsString>,
        source: &Path,
        folder: &Path,
        refuse: fn(&str) -> bool,
    ) -> Job {
        let object = folder.join(source.file_name().unwrap_or_default()).with_extension("o");
        let mut arguments: Vec<OsString> = arguments.into_iter().collect();
        arguments.extend(["-MD".into(), "-MF".into(), object.with_extension("d").into()]);
        arguments.extend(["-c".into(), source.into(), "-o".into(), object.clone().into()]);
        Job { source: source.to_owned(), object, program: program.to_owned(), arguments, refuse }
    }

    fn command_line(&self) -> String {
        let words = std::iter::once(self.program.as_os_str()).chain(self.arguments.iter().map(OsString::as_os_str));
        words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
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
        let output = Command::new(&self.program)
            .args(&self.arguments)
            .output()
            .map_err(|error| format!("{} cannot be run: {error}", self.program.display()))?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() && !said.lines().any(self.refuse) {
            for line in said.lines() {
                println!("cargo::warning={line}");
            }
            return Ok(());
        }
        let _ = fs::remove_file(&self.object);
        let source = self.source.display();
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

/// Runs all jobs, `jobs` at a time. Every failure is reported, not just the first.
pub fn run(all: &[Job], jobs: usize) -> Result<(), String> {
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
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

/// Puts the objects in a static library and links the crate with it.
pub fn archive(name: &str, objects: &[Job]) -> Result<(), String> {
    let objects = objects.iter().map(|job| &job.object);
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
