//! A folder that appears whole or not at all.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

pub(super) fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::Io { path: path.to_owned(), source }
}

/// The folder under its temporary name. Dropping it before [`NewFolder::rename`] removes it.
pub(super) struct NewFolder {
    path: PathBuf,
    kept: bool,
}

impl NewFolder {
    /// Refuses an `out` that is there already, or that would lie in the model's folder.
    pub fn check(model: &Path, out: &Path) -> Result<()> {
        let refused = |why: &str| Err(Error::InvalidRequest(format!("{}: {why}", out.display())));
        match fs::read_dir(out).map(|mut entries| entries.next().is_none()) {
            Ok(true) => {}
            Ok(false) => return refused("the output folder exists and is not empty; nothing is written over"),
            Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(out).is_err() => {}
            Err(error) => return Err(io_error(out)(error)),
        }
        let parent = parent(out)?;
        let model = model.canonicalize().map_err(io_error(model))?;
        match parent.starts_with(&model) {
            true => refused("the output folder lies inside the model's"),
            false => Ok(()),
        }
    }

    /// Makes the folder, beside `out`, so that renaming it is one step of the file system.
    pub fn make(out: &Path) -> Result<NewFolder> {
        let Some(name) = out.file_name() else {
            return Err(Error::InvalidRequest(format!("{}: is no name of a folder to make", out.display())));
        };
        let name = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
        let path = parent(out)?.join(name);
        fs::create_dir(&path).map_err(io_error(&path))?;
        Ok(NewFolder { path, kept: false })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the folder, whose files are on disk, its name.
    pub fn rename(mut self, out: &Path) -> Result<()> {
        sync_folder(&self.path)?;
        fs::rename(&self.path, out).map_err(io_error(out))?;
        self.kept = true;
        sync_folder(&parent(out)?)
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing more can be done, and the error that led here is the one to report.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The folder that `out` is to be made in, which must be there.
fn parent(out: &Path) -> Result<PathBuf> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    parent.canonicalize().map_err(io_error(parent))
}

/// Forces a folder's list of names to disk, where the system can.
fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(unix) { File::open(path).and_then(|folder| folder.sync_all()).map_err(io_error(path)) } else { Ok(()) }
}
