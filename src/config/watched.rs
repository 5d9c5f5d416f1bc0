//! Whether the content of files has changed.
//!
//! The content is looked at, from time to time, and not the file system's events: Kubernetes swaps the files of a Secret
//! or `ConfigMap` by renaming a directory that a symlink points to, of which a watch on the file hears nothing, or only
//! that the old one is gone. What is kept is a hash, since the files may hold secrets.

use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;

use secrecy::zeroize::Zeroizing;

use super::secret::read_file;

/// Files, and the content that was last taken from them.
#[derive(Debug)]
pub struct Watched {
    files: Vec<PathBuf>,
    hasher: RandomState,
    taken: Content,
}

/// What the files hold at one time. One that cannot be read is a content of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content(u64);

impl Watched {
    /// What `files` hold now counts as taken. So this comes before they are read for use, or a change between the two
    /// would go unnoticed.
    pub fn new(files: Vec<PathBuf>) -> Self {
        let mut watched = Self {
            files,
            hasher: RandomState::new(),
            taken: Content(0),
        };
        watched.taken = watched.content();
        watched
    }

    /// What the files hold now, if it is not what was taken. Blocks on the file system.
    pub fn changed(&self) -> Option<Content> {
        let content = self.content();
        (content != self.taken).then_some(content)
    }

    /// From here on `content` is no change. What was refused is better not taken: it is then looked at again.
    pub fn take(&mut self, content: Content) {
        self.taken = content;
    }

    fn content(&self) -> Content {
        let read = |file| read_file(file).map(Zeroizing::new).map_err(|wrong| wrong.what);
        let files: Vec<_> = self.files.iter().map(|file| read(file)).collect();
        let hashed = files.iter().map(|content| match content {
            Ok(bytes) => self.hasher.hash_one((true, bytes.as_slice())),
            Err(what) => self.hasher.hash_one((false, what)),
        });
        Content(self.hasher.hash_one(hashed.collect::<Vec<_>>()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_change_is_seen_until_it_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<_> = ["a", "b"].map(|name| folder.path().join(name)).into();
        for file in &files {
            fs::write(file, "old").unwrap();
        }
        let mut watched = Watched::new(files.clone());
        assert_eq!(watched.changed(), None);
        fs::write(&files[1], "new").unwrap();
        let changed = watched.changed().unwrap();
        assert_eq!(watched.changed(), Some(changed), "it is a change until it is taken");
        watched.take(changed);
        assert_eq!(watched.changed(), None);
        fs::write(&files[1], "old").unwrap();
        assert!(watched.changed().is_some());
    }

    #[test]
    fn the_same_bytes_written_again_are_no_change() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        fs::write(&file, "same").unwrap();
        let watched = Watched::new(vec![file.clone()]);
        fs::remove_file(&file).unwrap();
        assert!(watched.changed().is_some(), "a file that is gone");
        fs::write(&file, "same").unwrap();
        assert_eq!(watched.changed(), None);
    }

    #[test]
    fn bytes_that_move_from_one_file_to_the_next_are_a_change() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<_> = ["a", "b"].map(|name| folder.path().join(name)).into();
        fs::write(&files[0], "ab").unwrap();
        fs::write(&files[1], "c").unwrap();
        let watched = Watched::new(files.clone());
        fs::write(&files[0], "a").unwrap();
        fs::write(&files[1], "bc").unwrap();
        assert!(watched.changed().is_some());
    }

    #[test]
    fn the_swap_of_a_mounted_secret_is_a_change() {
        let mount = tempfile::tempdir().unwrap();
        let at = |name: &str| mount.path().join(name);
        for (version, content) in [("..1", "old"), ("..2", "new")] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("tls.crt"), content).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/tls.crt", at("tls.crt")).unwrap();
        let watched = Watched::new(vec![at("tls.crt")]);
        assert_eq!(watched.changed(), None);
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        assert!(watched.changed().is_some());
    }
}
