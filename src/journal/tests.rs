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

use proptest::{collection::vec, prelude::*};

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
    let kept: Vec<_> = journal.kept().map(|entries| read(entries.unwrap())).collect();
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

/// What a run that goes on from a journal reads: the states and what was kept.
fn read_all(dir: &Path) -> Result<Vec<Vec<u8>>, Error> {
    let journal = Journal::open(dir)?;
    let read = |mut entries: Entries| -> Result<Vec<u8>, Error> {
        let bytes = entries.next()?;
        entries.end().map(|()| bytes)
    };
    let state = journal.state()?.map(read).transpose()?;
    let kept = journal.kept().map(|entries| read(entries?)).collect::<Result<Vec<_>, _>>()?;
    Ok(state.into_iter().chain(kept).collect())
}

/// Something that happens to the files of a journal, each named by its number.
#[derive(Clone, Copy, Debug)]
enum Mishap {
    Remove(usize),
    /// A copy of the first takes the name of the second.
    Copy(usize, usize),
    Swap(usize, usize),
    /// The file of this name in the journal of another run takes its place.
    Foreign(usize),
}

fn mishap() -> impl Strategy<Value = Mishap> {
    prop_oneof![
        any::<usize>().prop_map(Mishap::Remove),
        any::<(usize, usize)>().prop_map(|(from, to)| Mishap::Copy(from, to)),
        any::<(usize, usize)>().prop_map(|(one, other)| Mishap::Swap(one, other)),
        any::<usize>().prop_map(Mishap::Foreign),
    ]
}

/// A journal of some saves, of the run of this number.
fn journal_of(run: u8) -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    for n in 0..SAVES {
        let [mut kept, mut state] = contents(n);
        kept.push(run);
        state.push(run);
        let saved: Result<(), Error> =
            journal.save("label", |record| record.add(&kept), |record| record.add(&state));
        saved.unwrap();
    }
    let files = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (name(&path).into_string().unwrap(), fs::read(&path).unwrap())).collect()
}

proptest! {
    #[test]
    fn a_journal_that_is_not_whole_is_an_error(mishaps in vec(mishap(), 1..5)) {
        let (whole, foreign) = (journal_of(0), journal_of(1));
        // Names that a journal has, and has not yet.
        let names: Vec<String> = (0..=SAVES + 1)
            .flat_map(|n| [KEPT, STATE].map(|kind| format!("{n:06}.{kind}")))
            .collect();
        let at = |number: usize| &names[number % names.len()];
        let mut files = whole.clone();
        for mishap in mishaps {
            let put = |files: &mut BTreeMap<String, Vec<u8>>, name: &str, file: Option<Vec<u8>>| {
                match file {
                    Some(bytes) => drop(files.insert(name.into(), bytes)),
                    None => drop(files.remove(name)),
                }
            };
            match mishap {
                Mishap::Remove(i) => put(&mut files, at(i), None),
                Mishap::Copy(i, j) => {
                    let copy = files.get(at(i)).cloned();
                    put(&mut files, at(j), copy);
                }
                Mishap::Swap(i, j) => {
                    let [one, other] = [i, j].map(|i| files.get(at(i)).cloned());
                    put(&mut files, at(i), other);
                    put(&mut files, at(j), one);
                }
                Mishap::Foreign(i) => put(&mut files, at(i), foreign.get(at(i)).cloned()),
            }
        }
        let found = |files: &BTreeMap<String, Vec<u8>>| {
            let dir = tempfile::tempdir().unwrap();
            files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
            read_all(dir.path())
        };
        match found(&files) {
            Err(error) => prop_assert!(error.to_string().contains("--force"), "{error}"),
            // Nothing, of which a run begins; or all of one run.
            Ok(read) if read.is_empty() => {}
            Ok(read) => {
                let runs = [&whole, &foreign].map(|files| found(files).unwrap());
                prop_assert!(runs.contains(&read));
            }
        }
    }
}

#[test]
fn what_is_missing_is_named_and_stays() {
    for gone in ["000000.kept", "000002.kept", "000003.kept", "000003.state"] {
        let dir = tempfile::tempdir().unwrap();
        let mut files = journal_of(0);
        files.remove(gone);
        files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
        let error = Journal::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("{gone} is missing")), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), files.len());
        assert_eq!(Journal::has_saves(dir.path()).is_err(), gone.ends_with("state"));
    }
}

#[test]
fn the_journal_of_another_version_is_not_called_damaged() {
    let other = Version { barber: "0.0.9".into(), ..Version::current() };
    let title = Title { label: "label".into(), version: other.clone(), kept: vec!["a".into()] };
    let by_version = |record: &mut Record| record.add_toml(&title);
    // As it was before states had titles.
    let untitled = |record: &mut Record| {
        record.add(b"refinement, 1 of 2 layers")?;
        record.add(b"streams = []\n[place]\nphase = 'refinement'\nlayers = 1\n")
    };
    type Write<'a> = &'a dyn Fn(&mut Record) -> Result<(), Error>;
    let writes: [(Write<'_>, String); 2] =
        [(&by_version, other.to_string()), (&untitled, "another version of barber".into())];
    for (write, by) in writes {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.write::<Error>(&file(dir.path(), 0, STATE), write).unwrap();
        let error = Journal::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("is the state of a run of {by}")), "{error}");
        assert!(error.contains("--force") && !error.contains("damaged"), "{error}");
        assert_eq!(Journal::label(dir.path()).unwrap_err().to_string(), error);
    }
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
