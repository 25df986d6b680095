//! Each step of writing fails in turn, for itself or as on a disk that stays full.

use std::{cell::Cell, collections::BTreeMap, fs, path::Path, rc::Rc, time::Duration};

use super::{Settings, prune};
use crate::{
    files::testing::{full, gated},
    recipe::{Loaded, load},
};

/// What a run wrote, but for its report, which has times.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = files.map(|path| {
        (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())
    });
    files.filter(|(name, _)| !name.starts_with("barber-report")).collect()
}

fn loaded(dir: &Path) -> Loaded {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let recipe = dir.join("recipe.toml");
    let text = format!(
        "model.path = '{}'\ncalibration = {{ source = '{}', samples = 1 }}\n\
         mask = {{ init = 'sparsegpt' }}\nrefine = [{{ use = 'rebuild', retain = true }}]\n\
         output.path = 'out'\n",
        here.join("tiny-llama").display(),
        here.join("calibration.json").display()
    );
    fs::write(&recipe, text).unwrap();
    load(&recipe, &[]).unwrap()
}

#[test]
fn whatever_step_fails_nothing_is_half_done_and_the_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (loaded, out, partial) =
        (loaded(dir.path()), dir.path().join("out"), dir.path().join("out.partial"));
    let every = Some(Duration::ZERO);
    let settings = Settings { save_every: every, ..Settings::default() };
    let steps = Rc::new(Cell::new(0));
    let counted = steps.clone();
    let count = move |_: crate::files::Step<'_>| {
        counted.set(counted.get() + 1);
        Ok(())
    };
    gated(count, || prune(&loaded, &settings)).unwrap();
    let expected = contents(&out);
    assert!(steps.get() > 80, "{}", steps.get());
    // There is a result that the run is to replace, or there is none.
    for failing in 0..steps.get() {
        let (lasting, replaces) = (failing % 2 == 0, failing % 3 == 0);
        let settings = Settings { force: replaces, ..settings };
        if out.exists() {
            fs::remove_dir_all(&out).unwrap();
        }
        if replaces {
            fs::create_dir_all(&out).unwrap();
            fs::write(out.join("config.json"), "{}").unwrap();
        }
        let mut step = 0;
        let gate = move |_: crate::files::Step<'_>| {
            step += 1;
            let fails = if lasting { step > failing } else { step == failing + 1 };
            if fails { Err(full()) } else { Ok(()) }
        };
        let found = gated(gate, || prune(&loaded, &settings));
        if let Err(error) = found {
            assert!(!error.is_usage(), "step {failing}: {error}");
            assert!(error.to_string().contains("out"), "step {failing}: {error}");
        }
        // Under the output's name is a whole checkpoint, or the old one, or nothing.
        if out.is_dir() {
            let found = contents(&out);
            let old = replaces && found.keys().eq(["config.json"]) && found["config.json"] == b"{}";
            assert!(old || found == expected, "step {failing}");
        }
        // What failed may have come after the output had its name.
        if out.is_dir() && contents(&out) == expected && !partial.exists() {
            continue;
        }
        let again = prune(&loaded, &Settings { resume: true, force: replaces, ..settings });
        again.unwrap_or_else(|error| panic!("step {failing}: {error}"));
        assert!(contents(&out) == expected, "step {failing}");
        assert!(!partial.exists(), "step {failing}");
    }
}
