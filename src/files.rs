//! Files that the library leaves on disk: where they are kept, and writes that are complete or not there at all.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where fetched models and everything derived from models is kept: `$LONGSIGHT_CACHE` unless that is empty, else
/// `longsight` in the user's cache folder.
pub fn cache_dir() -> Option<PathBuf> {
    cache_dir_of(std::env::var_os("LONGSIGHT_CACHE"))
}

fn cache_dir_of(named: Option<OsString>) -> Option<PathBuf> {
    match named.filter(|d| !d.is_empty()) {
        Some(dir) => Some(dir.into()),
        None => dirs::cache_dir().map(|d| d.join("longsight")),
    }
}

/// A file under a name of its own beside the target, removed when dropped unless it took the target's name.
pub(crate) struct PartFile {
    path: PathBuf,
    kept: bool,
}

impl PartFile {
    /// Only names the file; the name belongs to this process and to no other call.
    pub(crate) fn beside(target: &Path) -> Self {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let mut name = target.file_name().map(ToOwned::to_owned).unwrap_or_default();
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        name.push(format!(".{}-{call}.part", std::process::id()));
        PartFile { path: target.with_file_name(name), kept: false }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its final name.
    pub(crate) fn keep_as(mut self, target: &Path) -> io::Result<()> {
        std::fs::rename(&self.path, target)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing more can be done about a file that cannot be removed.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Writes a file that nobody sees half of: beside the target first, then renamed. A failure leaves nothing behind
/// and an older file as it was.
pub(crate) fn write_atomic(path: &Path, contents: &[u8]) -> io::Result<()> {
    let part = PartFile::beside(path);
    let mut file = std::fs::File::create(part.path())?;
    file.write_all(contents)?;
    file.sync_all()?;
    drop(file);
    part.keep_as(path)
}

/// [`write_atomic`] into the cache folder, whose folders are made where they are missing.
pub(crate) fn write_cached(path: &Path, contents: &[u8]) -> io::Result<()> {
    make_folder_of(path)?;
    write_atomic(path, contents)
}

/// Makes the folders that a file lies in.
pub(crate) fn make_folder_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), std::fs::create_dir_all)
}

/// Lower-case hex of bytes.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_name_of_the_cache_is_none() {
        assert_eq!(cache_dir_of(Some("x".into())), Some("x".into()));
        assert_eq!(cache_dir_of(Some("".into())), cache_dir_of(None));
    }

    #[test]
    fn a_write_is_complete_or_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let files = || std::fs::read_dir(dir.path().join("a")).unwrap().count();
        let path = dir.path().join("a/b.json");
        write_cached(&path, b"old").unwrap();
        write_cached(&path, b"new").unwrap();
        assert_eq!((std::fs::read(&path).unwrap(), files()), (b"new".to_vec(), 1));
        // A folder of that name cannot be replaced by a file.
        let folder = dir.path().join("a/folder");
        std::fs::create_dir(&folder).unwrap();
        assert!(write_cached(&folder, b"x").is_err());
        assert_eq!(files(), 2, "the part file is gone");
    }
}
