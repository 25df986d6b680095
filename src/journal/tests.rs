//! A model check: wherever the power fails, the journal is that of a save that had begun, and no
//! older than the last one that had returned.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    rc::Rc,
};

use super::*;
use crate::{
    files::{
        Step,
        testing::{full, gated},
    },
    random::SplitMix64,
};

/// A disk as POSIX has it: what was written is safe once its file is synced, and names are once
/// their directory is.
#[derive(Clone, Default)]
struct Disk {
    files: Vec<Contents>,
    /// Names as the run sees them, and as they are on the disk.
    names: BTreeMap<OsString, usize>,
    safe: BTreeMap<OsString, usize>,
    /// What was done to names that is not on the disk.
    pending: Vec<Renamed>,
}

#[derive(Clone, Default)]
struct Contents {
    bytes: Vec<u8>,
    safe: usize,
}

/// A name that goes, and one that comes for a file.
#[derive(Clone)]
struct Renamed {
    gone: Option<OsString>,
    come: Option<(OsString, usize)>,
}

impl Renamed {
    fn apply(&self, names: &mut BTreeMap<OsString, usize>) {
        if let Some(gone) = &self.gone {
            names.remove(gone);
        }
        names.extend(self.come.clone());
    }
}

fn name(path: &Path) -> OsString {
    path.file_name().unwrap().to_owned()
}

impl Disk {
    fn rename(&mut self, gone: Option<&Path>, come: Option<(&Path, usize)>) {
        let come = come.map(|(path, file)| (name(path), file));
        let renamed = Renamed { gone: gone.map(name), come };
        renamed.apply(&mut self.names);
        self.pending.push(renamed);
    }

    fn step(&mut self, dir: &Path, step: Step<'_>) {
        match step {
            Step::Create(path) => {
                self.rename(None, Some((path, self.files.len())));
                self.files.push(Contents::default());
            }
            Step::Rename(from, to) => {
                let file = self.names[&name(from)];
                self.rename(Some(from), Some((to, file)));
            }
            Step::Remove(path) => self.rename(Some(path), None),
            Step::Write(path, bytes) => {
                self.files[self.names[&name(path)]].bytes.extend(bytes);
            }
            Step::Sync(path) if path == dir => {
                self.safe = self.names.clone();
                self.pending.clear();
            }
            Step::Sync(path) => {
                let file = &mut self.files[self.names[&name(path)]];
                file.safe = file.bytes.len();
            }
            Step::CreateDir(path) => unreachable!("a journal makes no {}", path.display()),
        }
    }

    /// What is found in `dir` when the power fails: some of what is not safe is there, some is not,
    /// and some is nothing but zeros.
    fn crash(&self, dir: &Path, random: &mut SplitMix64) {
        let mut names = self.safe.clone();
        let done = random.below(self.pending.len() + 1);
        self.pending[..done].iter().for_each(|renamed| renamed.apply(&mut names));
        for (name, file) in names {
            let Contents { bytes, safe } = &self.files[file];
            let mut bytes = bytes.clone();
            bytes.truncate(safe + random.below(bytes.len() - safe + 1));
            if random.below(2) == 0 {
                bytes[*safe..].fill(0);
            }
            fs::write(dir.join(name), bytes).unwrap();
        }
    }
}

/// What save `n` adds, and what its state is.
fn contents(n: u64) -> [Vec<u8>; 2] {
    [vec![n as u8; 10 + 3 * n as usize], vec![!n as u8; 40 - 5 * n as usize]]
}

fn save(journal: &mut Journal, n: u64) -> Result<(), Error> {
    let [kept, state] = contents(n);
    journal.save("label", |record| record.add(&kept), |record| record.add(&state))
}

/// The number of the last save, all of whose contents are checked.
fn last(journal: &Journal) -> Option<u64> {
    let read = |mut entries: Entries| {
        let bytes = entries.next().unwrap();
        entries.end().unwrap();
        bytes
    };
    let state = read(journal.state().unwrap()?);
    let kept: Vec<_> = journal.kept().unwrap().map(|entries| read(entries.unwrap())).collect();
    let last = kept.len() as u64 - 1;
    assert_eq!(state, contents(last)[1]);
    kept.iter().zip(0..).for_each(|(found, n)| assert_eq!(*found, contents(n)[0]));
    Some(last)
}

const SAVES: u64 = 4;

#[test]
fn wherever_the_power_fails_the_last_save_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    // The disk before each step, and the saves that had returned.
    let disks = Rc::new(RefCell::new(vec![(Disk::default(), 0)]));
    let seen = disks.clone();
    let gate = {
        let path = path.clone();
        move |step: Step<'_>| {
            let mut disks = seen.borrow_mut();
            let (mut disk, saves) = disks.last().cloned().unwrap();
            disk.step(&path, step);
            disks.push((disk, saves));
            Ok(())
        }
    };
    gated(gate, || {
        let mut journal = Journal::open(&path).unwrap();
        for n in 0..SAVES {
            save(&mut journal, n).unwrap();
            disks.borrow_mut().last_mut().unwrap().1 = n + 1;
        }
    });
    let mut random = SplitMix64::new(1);
    let disks = disks.borrow();
    assert!(disks.len() > 10 * SAVES as usize);
    for (disk, saves) in disks.iter() {
        for _ in 0..20 {
            let dir = tempfile::tempdir().unwrap();
            disk.crash(dir.path(), &mut random);
            let mut journal = Journal::open(dir.path()).unwrap();
            let found = last(&journal).map_or(0, |last| last + 1);
            assert!(found == *saves || found == saves + 1, "{found} of {saves}");
            let label = Journal::label(dir.path()).unwrap();
            assert_eq!(label.is_some(), found > 0);
            // And it goes on.
            if found < SAVES {
                save(&mut journal, found).unwrap();
                assert_eq!(last(&Journal::open(dir.path()).unwrap()), Some(found));
            }
        }
    }
}

#[test]
fn whatever_step_fails_the_save_before_stays() {
    for (lasting, failing) in (0..40).flat_map(|step| [(false, step), (true, step)]) {
        let dir = tempfile::tempdir().unwrap();
        let mut steps = 0;
        let gate = move |_: Step<'_>| {
            steps += 1;
            let fails = if lasting { steps > failing } else { steps == failing + 1 };
            if fails { Err(full()) } else { Ok(()) }
        };
        let saved = gated(gate, || {
            let mut journal = Journal::open(dir.path()).unwrap();
            (0..3).take_while(|n| save(&mut journal, *n).is_ok()).count() as u64
        });
        let mut journal = Journal::open(dir.path()).unwrap();
        let found = last(&journal).map_or(0, |last| last + 1);
        assert!(found == saved || found == saved + 1, "step {failing}: {found} of {saved}");
        (found..3).for_each(|n| save(&mut journal, n).unwrap());
        assert_eq!(last(&journal), Some(2));
    }
}

#[test]
fn damage_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    save(&mut Journal::open(dir.path()).unwrap(), 3).unwrap();
    let path = dir.path().join("000000.state");
    let sound = fs::read(&path).unwrap();
    let read = |bytes: &[u8]| -> Result<Vec<u8>, Error> {
        fs::write(&path, bytes).unwrap();
        let mut state = Journal::open(dir.path())?.state()?.unwrap();
        let bytes = state.next()?;
        state.end().map(|()| bytes)
    };
    assert_eq!(read(&sound).unwrap(), contents(3)[1]);
    for at in 0..sound.len() {
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        assert!(matches!(read(&bytes), Err(Error::Damaged { .. })), "byte {at}");
        assert!(matches!(read(&sound[..at]), Err(Error::Damaged { .. })), "{at} bytes");
    }
    let error = read(&[&sound[..], &[0]].concat()).unwrap_err().to_string();
    assert!(error.contains("000000.state: damaged") && error.contains("--force"), "{error}");
}

#[test]
fn what_cannot_be_written_is_named() {
    let dir: PathBuf = "no/such/directory".into();
    let Err(error) = Journal::open(&dir) else { panic!("opened") };
    assert!(error.to_string().starts_with("no/such/directory: "), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    let error = gated(|_| Err::<(), io::Error>(full()), || save(&mut journal, 0)).unwrap_err();
    assert!(error.to_string().contains("draft"), "{error}");
}
