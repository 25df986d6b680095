//! Replays the seed corpora of the fuzz targets.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking")]

#[path = "../fuzz/src/checks.rs"]
mod checks;

fn replay(target: &str, check: fn(&[u8])) {
    let corpus = std::fs::read_dir(format!("fuzz/corpus/{target}")).unwrap();
    let mut count = 0;
    for entry in corpus {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        check(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count >= 5, "{target} has {count} seeds");
}

#[test]
fn recipe() {
    replay("recipe", checks::recipe);
}

#[test]
fn shard() {
    replay("shard", checks::shard);
}

#[test]
fn rebuild() {
    replay("rebuild", checks::rebuild);
}
