//! Compiled kernels on disk, so that a shard that starts again does not compile them again.
//!
//! A file is named after all that its contents depend on, and begins with a hash of them: one that was cut, damaged or
//! renamed is as good as none. Files appear whole, by a rename, so that ranks of several processes do not disturb one another.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use std::{env, thread};

use super::compile::{Arch, Source};
use super::libraries::Version;

/// Most cubins that are kept: some sets of modules, each for a GPU, a version of Lockstep and one of NVRTC.
pub const MAX_FILES: usize = 64;

/// Bytes of a hash.
const HASH_LEN: usize = 32;

/// Longer than compiling takes anywhere: who holds the lock for so long does not work, and is not waited for.
const MAX_LOCK_WAIT: Duration = Duration::from_secs(120);

/// How often a lock that is held is asked for.
const LOCK_POLL: Duration = Duration::from_millis(20);

/// A new file that is so old was left by a process that died.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);

const CUBIN_SUFFIX: &str = ".cubin";
const NEW_PREFIX: &str = ".new-";

/// What a cubin depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    hash: [u8; HASH_LEN],
    file_name: String,
}

impl Key {
    /// The key of a source's cubin. `name` is for those who look into the folder.
    pub fn new(
        name: &str,
        source: &Source,
        headers: &[Source],
        options: &[String],
        arch: Arch,
        nvrtc: Version,
    ) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("Lockstep cubin 1");
        // Each with its length before it, so that nothing that ends one text can begin the next.
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        add(&arch.target());
        add(&nvrtc.to_string());
        add(&options.len().to_string());
        options.iter().for_each(|option| add(option));
        for source in std::iter::once(source).chain(headers) {
            add(source.file);
            add(source.text);
        }
        let hash = hasher.finalize();
        let file_name = format!("{name}-{}-{}{CUBIN_SUFFIX}", arch.target(), hash.to_hex());
        Self { hash: hash.into(), file_name }
    }

    /// The name of the cubin's file.
    pub fn file_name(&self) -> &str {
        &self.file_name
    }
}

/// Where cubins are kept unless an option says otherwise: `$XDG_CACHE_HOME/lockstep`, or `~/.cache/lockstep`. Without a
/// home there is a warning, and none.
pub fn default_folder() -> Option<PathBuf> {
    let folder = folder_of(env::var_os("XDG_CACHE_HOME"), env::var_os("HOME"));
    if folder.is_none() {
        tracing::warn!("compiled kernels are not kept: neither XDG_CACHE_HOME nor HOME is an absolute path");
    }
    folder
}

/// Relative paths count as none: they would be another place for each process.
fn folder_of(xdg_cache_home: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    let absolute = |path: Option<OsString>| path.map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = absolute(xdg_cache_home).or_else(|| Some(absolute(home)?.join(".cache")))?;
    Some(caches.join("lockstep"))
}

/// A folder of cubins.
#[derive(Debug)]
pub struct CubinCache {
    folder: PathBuf,
}

impl CubinCache {
    /// Opens the folder, and makes it where it is not there.
    ///
    /// # Errors
    /// It cannot be made, or others than this process's user may write to it: what is in it runs on the GPU.
    pub fn open(folder: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let facts = fs::metadata(folder)?;
        if facts.uid() != rustix::process::geteuid().as_raw() {
            return Err(io::Error::other("the folder is another user's"));
        }
        if facts.mode() & 0o022 != 0 {
            return Err(io::Error::other("others may write to the folder: chmod go-w makes it safe"));
        }
        Ok(Self { folder: folder.into() })
    }

    /// The cubin of a key, if it is there and whole.
    pub fn read(&self, key: &Key) -> Option<Vec<u8>> {
        let mut file = File::open(self.folder.join(&key.file_name)).ok()?;
        let mut contents = Vec::new();
        file.read_to_end(&mut contents).ok()?;
        let (hash, cubin) = contents.split_at_checked(HASH_LEN)?;
        if hash != blake3::keyed_hash(&key.hash, cubin).as_bytes() {
            tracing::warn!(file = key.file_name, "a compiled kernel is damaged: it is compiled again");
            return None;
        }
        // What is used stays; failing to say so costs a compilation at worst.
        let _ = file.set_modified(SystemTime::now());
        contents.drain(..HASH_LEN);
        Some(contents)
    }

    /// Keeps a cubin, and deletes the least recently used ones beyond [`MAX_FILES`].
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, key: &Key, cubin: &[u8]) -> io::Result<()> {
        let new = self.folder.join(format!("{NEW_PREFIX}{:016x}", rand::random::<u64>()));
        let written = write_new(&new, &[blake3::keyed_hash(&key.hash, cubin).as_bytes(), cubin])
            .and_then(|()| fs::rename(&new, self.folder.join(&key.file_name)));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written.and_then(|()| self.prune())
    }

    /// Waits until no other process compiles into this folder; one that dies lets go. `None` where that cannot be known or
    /// takes too long: then two may compile the same, which harms nothing.
    pub fn lock(&self) -> Option<File> {
        let path = self.folder.join("lock");
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path).ok()?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Some(file),
                Err(TryLockError::WouldBlock) if start.elapsed() < MAX_LOCK_WAIT => thread::sleep(LOCK_POLL),
                Err(error) => {
                    tracing::warn!(folder = ?self.folder, %error, "does not wait for other ranks to compile kernels");
                    return None;
                }
            }
        }
    }

    fn prune(&self) -> io::Result<()> {
        let now = SystemTime::now();
        let mut cubins = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name();
            // Another rank may have deleted it by now.
            let Ok(modified) = entry.metadata().and_then(|facts| facts.modified()) else { continue };
            if name.as_encoded_bytes().ends_with(CUBIN_SUFFIX.as_bytes()) {
                cubins.push((modified, entry.path()));
            } else if name.as_encoded_bytes().starts_with(NEW_PREFIX.as_bytes())
                && now.duration_since(modified).is_ok_and(|age| age > LEFT_BEHIND)
            {
                let _ = fs::remove_file(entry.path());
            }
        }
        cubins.sort();
        let num_extra = cubins.len().saturating_sub(MAX_FILES);
        for (_, path) in &cubins[..num_extra] {
            let _ = fs::remove_file(path);
        }
        Ok(())
    }
}

fn write_new(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    parts.iter().try_for_each(|part| file.write_all(part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const SOURCE: Source = Source { file: "a.cu", text: "one" };
    const HEADER: Source = Source { file: "a.cuh", text: "two" };
    const NVRTC: Version = Version { major: 13, minor: 0, patch: 0 };

    fn hopper() -> Arch {
        Arch::new(9, 0).unwrap()
    }

    fn key_of(text: &'static str) -> Key {
        Key::new("a", &Source { text, ..SOURCE }, &[HEADER], &[], hopper(), NVRTC)
    }

    #[test]
    fn a_key_follows_all_that_a_cubin_depends_on() {
        let options = ["-a".to_owned(), "-b".to_owned()];
        let keys = [
            Key::new("a", &SOURCE, &[HEADER], &options, hopper(), NVRTC),
            Key::new("a", &Source { text: "One", ..SOURCE }, &[HEADER], &options, hopper(), NVRTC),
            Key::new("a", &SOURCE, &[Source { text: "Two", ..HEADER }], &options, hopper(), NVRTC),
            Key::new("a", &SOURCE, &[Source { file: "b.cuh", ..HEADER }], &options, hopper(), NVRTC),
            Key::new("a", &SOURCE, &[], &options, hopper(), NVRTC),
            Key::new("a", &SOURCE, &[HEADER], &options[..1], hopper(), NVRTC),
            Key::new("a", &SOURCE, &[HEADER], &["-a-b".to_owned()], hopper(), NVRTC),
            Key::new("a", &SOURCE, &[HEADER], &options, Arch::OLDEST, NVRTC),
            Key::new("a", &SOURCE, &[HEADER], &options, hopper(), Version { minor: 1, ..NVRTC }),
        ];
        for (i, key) in keys.iter().enumerate() {
            assert!(keys[..i].iter().all(|other| other.hash != key.hash), "{i}");
        }
        assert_eq!(keys[0], Key::new("a", &SOURCE, &[HEADER], &options, hopper(), NVRTC));
        assert!(keys[0].file_name().starts_with("a-sm_90a-"), "{}", keys[0].file_name());
    }

    #[test]
    fn the_folder_is_below_the_home_unless_it_is_named() {
        let folder = |xdg: &str, home: &str| folder_of(Some(xdg.into()), Some(home.into()));
        assert_eq!(folder("/x", "/home/a"), Some("/x/lockstep".into()));
        assert_eq!(folder("", "/home/a"), Some("/home/a/.cache/lockstep".into()));
        assert_eq!(folder("x", "/home/a"), Some("/home/a/.cache/lockstep".into()));
        assert_eq!(folder("", ""), None);
        assert_eq!(folder_of(None, None), None);
    }

    #[test]
    fn what_is_written_is_read_back_and_private() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("cache/lockstep");
        let cache = CubinCache::open(&folder).unwrap();
        assert_eq!(cache.read(&key_of("one")), None);
        cache.write(&key_of("one"), b"cubin").unwrap();
        assert_eq!(cache.read(&key_of("one")).as_deref(), Some(&b"cubin"[..]));
        assert_eq!(cache.read(&key_of("other")), None);
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700);
        assert_eq!(mode(&folder.join(key_of("one").file_name())), 0o600);
        // Nothing is left of how it was written.
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }

    #[test]
    fn damage_is_noticed() {
        let home = tempfile::tempdir().unwrap();
        let cache = CubinCache::open(home.path()).unwrap();
        let key = key_of("one");
        let path = home.path().join(key.file_name());
        cache.write(&key, b"some code").unwrap();
        let whole = fs::read(&path).unwrap();
        for len in [0, HASH_LEN - 1, HASH_LEN, whole.len() - 1] {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(cache.read(&key), None, "cut to {len}");
        }
        for at in [0, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert_eq!(cache.read(&key), None, "damaged at {at}");
        }
        // One kernel's code under another one's name.
        fs::write(home.path().join(key_of("two").file_name()), &whole).unwrap();
        assert_eq!(cache.read(&key_of("two")), None);
        cache.write(&key, b"some code").unwrap();
        assert_eq!(cache.read(&key).as_deref(), Some(&b"some code"[..]));
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_refused() {
        let home = tempfile::tempdir().unwrap();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = CubinCache::open(home.path()).unwrap_err();
        assert!(error.to_string().contains("others may write"), "{error}");
    }

    #[test]
    fn the_least_recently_used_files_go() {
        let home = tempfile::tempdir().unwrap();
        let cache = CubinCache::open(home.path()).unwrap();
        let age = |path: &Path, seconds: u64| {
            let time = SystemTime::now() - Duration::from_secs(seconds);
            File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
        };
        for i in 0..MAX_FILES {
            let path = home.path().join(format!("old-{i}{CUBIN_SUFFIX}"));
            fs::write(&path, "").unwrap();
            age(&path, 1000 + i as u64);
        }
        cache.write(&key_of("one"), b"cubin").unwrap();
        // The oldest of all, until it is read.
        age(&home.path().join(key_of("one").file_name()), 5000);
        assert!(cache.read(&key_of("one")).is_some());
        let left_behind = home.path().join(format!("{NEW_PREFIX}1"));
        let under_way = home.path().join(format!("{NEW_PREFIX}2"));
        fs::write(&left_behind, "").unwrap();
        fs::write(&under_way, "").unwrap();
        age(&left_behind, 2 * LEFT_BEHIND.as_secs());
        cache.write(&key_of("two"), b"cubin").unwrap();

        assert!(cache.read(&key_of("one")).is_some() && cache.read(&key_of("two")).is_some());
        assert!(!left_behind.exists() && under_way.exists());
        let is_cubin =
            |entry: io::Result<fs::DirEntry>| entry.unwrap().path().extension() == Some("cubin".as_ref());
        assert_eq!(
            fs::read_dir(home.path()).unwrap().filter_map(|entry| is_cubin(entry).then_some(())).count(),
            MAX_FILES
        );
        assert!(!home.path().join(format!("old-{}{CUBIN_SUFFIX}", MAX_FILES - 1)).exists());
        assert!(home.path().join(format!("old-0{CUBIN_SUFFIX}")).exists());
    }

    #[test]
    fn the_lock_is_held_by_one_at_a_time() {
        let home = tempfile::tempdir().unwrap();
        let cache = CubinCache::open(home.path()).unwrap();
        let held = cache.lock().unwrap();
        let start = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| cache.lock().unwrap());
            thread::sleep(Duration::from_millis(100));
            drop(held);
        });
        assert!(start.elapsed() >= Duration::from_millis(100));
    }
}
