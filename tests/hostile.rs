//! Files from the internet that mean harm, or are badly damaged: each is refused with a message that
//! says what is wrong, within 300 MiB of memory.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    fs::{self, File},
    io::Write,
    os::unix::{fs::symlink, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use util::{Run, command, flat, tiny};

/// Bytes of memory that a refusal may take.
const MEMORY: u64 = 300 << 20;

/// Runs the program, and measures the most memory that it had.
fn measured(arguments: &[&str]) -> (Run, u64) {
    let dir = tempfile::tempdir().unwrap();
    let [stdout, stderr] = ["stdout", "stderr"].map(|name| dir.path().join(name));
    let mut command = command(Path::new(env!("CARGO_BIN_EXE_barber")));
    command.args(arguments).env("NO_COLOR", "1").stdin(Stdio::null());
    command.stdout(File::create(&stdout).unwrap()).stderr(File::create(&stderr).unwrap());
    let (status, memory) = wait(&mut command);
    let text = |path: &Path| fs::read_to_string(path).unwrap();
    (Run { status, stdout: text(&stdout), stderr: text(&stderr) }, memory)
}

/// A process's exit status, 128 and more for a signal, and its largest resident memory. The kernel
/// tells it while the process runs; what it tells of ended ones counts the parent's memory, too.
fn wait(command: &mut Command) -> (i32, u64) {
    let mut child = command.spawn().unwrap();
    let path = format!("/proc/{}/status", child.id());
    let mut memory = 0;
    loop {
        let status = child.try_wait().unwrap();
        let peak = fs::read_to_string(&path).unwrap_or_default();
        let peak = peak.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB"));
        memory = memory.max(peak.map_or(0, |kb| kb.trim().parse::<u64>().unwrap() << 10));
        if let Some(status) = status {
            let signal = || 128 + status.signal().unwrap_or_default();
            return (status.code().unwrap_or_else(signal), memory);
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// That a run fails with a message, not by a panic, and within its memory.
#[track_caller]
fn refused(arguments: &[&str], status: i32, messages: &[&str]) {
    let (run, memory) = measured(arguments);
    let said = flat(&run.stderr);
    assert_eq!(run.status, status, "{arguments:?}: {}{}", run.stdout, run.stderr);
    for message in messages {
        assert!(said.contains(message), "{message}: {said}");
    }
    assert!(!said.contains("panicked") && run.stderr.len() < 1 << 20, "{said}");
    assert!(memory < MEMORY, "{} MiB: {said}", memory >> 20);
}

/// A file of so many bytes, of which none takes any place on the disk.
fn sparse(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}

/// A directory of its own with a text beside it, and how to measure a checkpoint.
struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("text.txt"), "a few words of text").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn shown(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// A checkpoint with this header, and so many bytes behind it.
    fn header(&self, header: &[u8], bytes: usize) {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.resize(file.len() + bytes, 0);
        fs::write(self.path("model/model.safetensors"), file).unwrap();
    }

    #[track_caller]
    fn is_refused(&self, message: &[&str]) {
        let (model, text) = (self.shown("model"), self.shown("text.txt"));
        refused(&["eval", &model, "--text", &text], 1, message);
    }
}

/// A copy of the tiny LLaMA.
fn checkpoint() -> Case {
    let case = Case::new();
    tiny(case.dir.path(), |_, _| ());
    case
}

/// A copy of the quickstart's model, which has a tokenizer.
fn with_tokenizer() -> Case {
    let case = Case::new();
    fs::create_dir(case.path("model")).unwrap();
    for entry in fs::read_dir("recipes/quickstart/model").unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), case.path("model").join(entry.file_name())).unwrap();
    }
    case
}

#[test]
fn headers_of_weights() {
    let case = checkpoint();
    let one = |offsets: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}}}"#)
    };
    let two = |first: &str, second: &str| {
        let tensor = |name: &str, offsets: &str| {
            format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}"#)
        };
        format!("{{{},{}}}", tensor("a", first), tensor("b", second))
    };
    for (header, message) in [
        (one("[0,4]").replace("[1]", "[4294967296,4294967296]"), "corrupt header"),
        (one("[4,0]"), "corrupt header"),
        (one("[0,18446744073709551615]"), "truncated or corrupt"),
        (one("[0,18446744073709551616]"), "corrupt header"),
        (one("[0,4]").replace("[1]", "[-1]"), "corrupt header"),
        (one("[0,4]").replace("F32", "F33"), "corrupt header"),
        (two("[0,4]", "[2,6]"), "corrupt header"),
        (two("[0,4]", "[8,12]"), "truncated or corrupt"),
        (two("[0,4]", "[4,8]").replace("\"b\"", "\"a\""), "corrupt header"),
        (format!("{}1{}", "{\"a\":".repeat(5000), "}".repeat(5000)), "corrupt header"),
        (String::new(), "corrupt header"),
    ] {
        case.header(header.as_bytes(), 8);
        case.is_refused(&["model.safetensors", message]);
    }
    case.header(two("[0,4]", "[0,4]").replace("\"b\"", "\"a\"").as_bytes(), 4);
    case.is_refused(&["model.safetensors", "there are two tensors `a`"]);
    case.header(b"{\"\xff\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4);
    case.is_refused(&["model.safetensors", "corrupt header"]);
    let file = case.path("model/model.safetensors");
    for length in [u64::MAX, 1 << 40, 90 << 20, 9] {
        fs::write(&file, length.to_le_bytes()).unwrap();
        case.is_refused(&["model.safetensors", "corrupt"]);
    }
    fs::write(&file, b"short").unwrap();
    case.is_refused(&["truncated or corrupt: the header promises 8 bytes and the file has 5"]);
    // A header as large as it says, of a gigabyte, and one of many small tensors.
    sparse(&file, 1 << 30);
    let mut start = fs::OpenOptions::new().write(true).open(&file).unwrap();
    start.write_all(&(90u64 << 20).to_le_bytes()).unwrap();
    case.is_refused(&["it has 90.0 MiB; all headers of a checkpoint together may have 8.0 MiB"]);
    // Matrices of experts in one tensor, without a byte.
    let stack = one("[0,0]").replace("\"a\"", "\"mlp.experts.down_proj\"");
    case.header(stack.replace("[1]", "[1099511627776,0,0]").as_bytes(), 0);
    case.is_refused(&[
        "model.safetensors",
        "more than 100000 experts, with `mlp.experts.down_proj`",
    ]);
    let tensor = |i| format!(r#""{i}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{}]}}"#, i + 1);
    let many: Vec<String> = (0..100_000).map(tensor).collect();
    case.header(format!("{{{}}}", many.join(",")).as_bytes(), 100_000);
    case.is_refused(&["has no tensor `model.embed_tokens.weight`"]);
}

#[test]
fn indices_of_shards() {
    let case = checkpoint();
    let index = case.path("model/model.safetensors.index.json");
    let secret = case.shown("model.safetensors");
    fs::rename(case.path("model/model.safetensors"), &secret).unwrap();
    for file in ["../model.safetensors", &secret, "a/../../model.safetensors", "config.json", ""] {
        fs::write(&index, json!({ "weight_map": { "a": file } }).to_string()).unwrap();
        case.is_refused(&[&format!(
            "tensor `a`: must name a safetensors file of the same directory, not {file:?}"
        )]);
    }
    let nested = "[".repeat(1 << 20);
    for (text, message) in [
        (
            r#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#,
            "tensor `a` is listed twice",
        ),
        (
            r#"{"weight_map":{"a":"x.safetensors"}}"#,
            "names the shard x.safetensors, which does not exist",
        ),
        (r#"{"weight_map":[]}"#, "expected an object"),
        (r#"{"weight_map":{"a":3}}"#, "expected a string"),
        ("{}", "has no `weight_map`"),
        (nested.as_str(), "not an index of shards"),
    ] {
        fs::write(&index, text).unwrap();
        case.is_refused(&["model.safetensors.index.json", message]);
    }
    sparse(&index, 1 << 30);
    case.is_refused(&["larger than 8.0 MiB, the limit for an index of shards"]);
}

#[test]
fn links_out_of_the_checkpoint() {
    for file in ["model.safetensors", "config.json", "tokenizer.json"] {
        let case = with_tokenizer();
        let (link, elsewhere) = (case.path("model").join(file), case.path(file));
        fs::rename(&link, &elsewhere).unwrap();
        symlink(&elsewhere, &link).unwrap();
        case.is_refused(&[file, ", outside the checkpoint"]);
    }
    // What would be copied to the output is not read from elsewhere either.
    let case = checkpoint();
    symlink("/etc/passwd", case.path("model/README.md")).unwrap();
    let recipe = util::recipe(case.dir.path(), "");
    let set = format!("model.path={}", case.shown("model"));
    refused(&["prune", &recipe, "--set", &set], 1, &["README.md is a link to", "/etc/passwd"]);
    assert!(!case.path("out").exists());
    // The hub's cache has links to the blobs beside its snapshots.
    fs::create_dir_all(case.path("models--a--b/snapshots")).unwrap();
    fs::create_dir(case.path("models--a--b/blobs")).unwrap();
    let snapshot = case.path("models--a--b/snapshots/c0ffee");
    fs::remove_file(case.path("model/README.md")).unwrap();
    fs::rename(case.path("model"), &snapshot).unwrap();
    fs::rename(snapshot.join("config.json"), case.path("models--a--b/blobs/1")).unwrap();
    symlink("../../blobs/1", snapshot.join("config.json")).unwrap();
    let set = format!("model.path={}", snapshot.display());
    let (run, _) = measured(&["prune", &recipe, "--set", &set]);
    assert_eq!(run.status, 0, "{}", run.stderr);
}

#[test]
fn configurations() {
    let case = checkpoint();
    let config = case.path("model/config.json");
    let fine: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    for (key, value, message) in [
        ("hidden_size", json!(u64::MAX), "`hidden_size` is 18446744073709551615, but it must be"),
        ("vocab_size", json!(1e300), "`vocab_size` must be a whole number"),
        ("num_hidden_layers", json!(4_000_000_000u64), "`num_hidden_layers` is 4000000000, but"),
        ("num_attention_heads", json!(2_147_483_647), "`num_key_value_heads` is 2, but"),
        ("head_dim", json!(2_147_483_646), "that is too many"),
        ("intermediate_size", json!(2_147_483_647), "config.json implies [2147483647, 64]"),
        ("num_hidden_layers", json!(10_000), "has no tensor `model.layers.2."),
        ("rope_theta", json!(-1), "`rope_theta` is -1"),
        ("rms_norm_eps", json!("NaN"), "`rms_norm_eps` must be a number"),
        (
            "rope_scaling",
            json!({ "rope_type": "longrope", "short_factor": [1e-320], "long_factor": [1] }),
            "`rope_scaling.short_factor`",
        ),
    ] {
        let mut changed = fine.clone();
        changed[key] = value;
        fs::write(&config, changed.to_string()).unwrap();
        case.is_refused(&[message]);
    }
    fs::write(&config, "[".repeat(1 << 20)).unwrap();
    case.is_refused(&["config.json: not valid JSON: recursion limit exceeded"]);
    sparse(&config, 1 << 30);
    case.is_refused(&["config.json: larger than 4.0 MiB, the limit for a config.json"]);
}

/// Weights that are as large as they say, and no memory has room for.
#[test]
fn terabytes_of_weights() {
    let case = checkpoint();
    let (vocabulary, hidden) = (1u64 << 31 >> 1, 1u64 << 10);
    let path = case.path("model/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["vocab_size"] = vocabulary.into();
    config["hidden_size"] = hidden.into();
    config["num_hidden_layers"] = 1.into();
    fs::write(&path, config.to_string()).unwrap();
    let decoder = llm_barber::family::decoder(&config).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in decoder.tensors() {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let tensor = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] });
        header.insert(name.into(), tensor);
    }
    let header = Value::Object(header).to_string();
    case.header(header.as_bytes(), 0);
    let file = fs::OpenOptions::new().write(true).open(case.path("model/model.safetensors"));
    file.unwrap().set_len((8 + header.len() + end) as u64).unwrap();
    case.is_refused(&["`model.embed_tokens.weight` takes 4.0 TiB of memory, and"]);
}

#[test]
fn tokenizers() {
    let case = with_tokenizer();
    let path = case.path("model/tokenizer.json");
    let fine: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let changed = |key: &str, value: Value| {
        let mut changed = fine.clone();
        changed[key] = value;
        changed
    };
    let nested = |depth: usize| {
        let lowercase = json!({ "type": "Lowercase" });
        (0..depth).fold(lowercase, |inner, _| json!({ "type": "Sequence", "normalizers": [inner] }))
    };
    let model = |merges: Value, prefix: Value| {
        let vocab = json!({ "a": 0, "é": 1, "aé": 2, "b": 3 });
        let model = json!({
            "type": "BPE", "vocab": vocab, "merges": merges, "continuing_subword_prefix": prefix,
        });
        changed("model", model)
    };
    for (tokenizer, message) in [
        (changed("normalizer", nested(1000)), "recursion limit exceeded"),
        (changed("model", json!({ "type": "Unigram", "vocab": [], "unk_id": 7 })), ""),
        // A prefix within a letter, and one longer than the token: the library slices both.
        (model(json!(["a é"]), json!("x")), "damaged"),
        (model(json!(["a b"]), json!("xxx")), "damaged"),
        // Merges that make each other.
        (model(json!(["ab a", "a ab"]), Value::Null), "out of vocabulary"),
        (json!([]), ""),
    ] {
        fs::write(&path, tokenizer.to_string()).unwrap();
        case.is_refused(&["tokenizer.json", message]);
    }
    // A letter becomes two, over and over, in a few kilobytes; and longer texts at once.
    let double = json!({ "type": "Replace", "pattern": { "String": "e" }, "content": "ee" });
    let long =
        json!({ "type": "Replace", "pattern": { "Regex": "" }, "content": "e".repeat(4000) });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": false });
    fs::write(case.path("text.txt"), "eeee the tree sees\n".repeat(20_000)).unwrap();
    for (key, value) in [
        ("normalizer", json!({ "type": "Sequence", "normalizers": vec![double; 30] })),
        ("normalizer", long),
        ("pre_tokenizer", json!({ "type": "Sequence", "pretokenizers": vec![bytes; 30] })),
    ] {
        fs::write(&path, changed(key, value).to_string()).unwrap();
        case.is_refused(&["tokenizer.json: its ", " expand a text to more than 8 times its size"]);
    }
    // A table that says that it has 4 GiB.
    let table = json!({ "type": "Precompiled", "precompiled_charsmap": "/P///w==" });
    fs::write(&path, changed("normalizer", table).to_string()).unwrap();
    case.is_refused(&["tokenizer.json", "a precompiled_charsmap that is shorter than it says"]);
    fs::write(case.path("text.txt"), "a few words of text").unwrap();
    // As deep as a file may be, in little time.
    fs::write(&path, changed("normalizer", nested(40)).to_string()).unwrap();
    let (run, memory) =
        measured(&["eval", &case.shown("model"), "--text", &case.shown("text.txt")]);
    assert!(run.status == 0 && memory < MEMORY, "{memory}: {}", run.stderr);
    sparse(&path, 1 << 30);
    case.is_refused(&["larger than 64.0 MiB, the limit for a tokenizer.json"]);
}

#[test]
fn recipes() {
    let case = Case::new();
    let path = case.path("r.toml");
    let is_refused = |text: &str, messages: &[&str]| {
        fs::write(&path, text).unwrap();
        refused(&["check", &case.shown("r.toml")], 2, messages);
    };
    is_refused(&format!("a = {}{}", "[".repeat(50_000), "]".repeat(50_000)), &["recursion"]);
    is_refused(&format!("a = {}1{}", "{b=".repeat(20_000), "}".repeat(20_000)), &["recursion"]);
    let path_of = |depth: usize| vec!["a"; depth].join(".");
    is_refused(&format!("{} = 1", path_of(60_000)), &["recursion"]);
    let many: String = (0..20_000).map(|i| format!("k{i} = 1\n")).collect();
    is_refused(&many, &["problems, of which these are the first", "unknown key `k0`"]);
    is_refused(&"=\n".repeat(100_000), &["problems, of which these are the first"]);
    is_refused(&format!("{} = 1", "a".repeat(50_000)), &["unknown key"]);
    let exclude = |globs: &[String]| format!("sparsity.exclude = {globs:?}");
    is_refused(
        &exclude(&["{".repeat(20_000)]),
        &["`sparsity.exclude.0`: the glob has 20000 bytes, at most 256 are allowed"],
    );
    is_refused(&exclude(&["{".repeat(250)]), &["sparsity.exclude.0"]);
    let nested = format!("{}{}", "{a,".repeat(60), "}".repeat(60));
    is_refused(&exclude(&vec![nested; 80]), &["more than 16384 bytes of globs"]);
    is_refused(
        "calibration.samples = 16000000\ncalibration.sequence_length = 16000000",
        &["`calibration.samples`: 16000000", "16000000 tokens"],
    );
    fs::write(&path, b"model.path = '\xff'").unwrap();
    refused(&["check", &case.shown("r.toml")], 2, &["not UTF-8 from byte 14 on"]);
    sparse(&path, 1 << 30);
    refused(
        &["check", &case.shown("r.toml")],
        2,
        &["larger than 256.0 KiB, the limit for a recipe"],
    );
}

/// Globs that take a while to match by backtracking are matched by an automaton.
#[test]
fn globs_that_explode() {
    let case = Case::new();
    let globs = vec![format!("{}b", "*a".repeat(120)); 60];
    let extra = format!("sparsity.exclude = {globs:?}");
    let recipe = util::recipe(case.dir.path(), &extra);
    let (run, memory) = measured(&["check", &recipe]);
    // They match nothing, which takes no longer to say.
    let said = flat(&run.stderr).contains("matches no tensor of the model");
    assert!(said && run.status == 2 && memory < MEMORY, "{} MiB: {}", memory >> 20, run.stderr);
}

/// Prunes with a calibration text of this name.
#[track_caller]
fn calibration(case: &Case, name: &str, sets: &[&str], messages: &[&str]) {
    let recipe = case.shown("r.toml");
    let text = format!(
        "model.path = 'model'\noutput.path = 'out'\n[calibration]\nsource = '{name}'\n\
         samples = 2\nsequence_length = 8\n"
    );
    fs::write(&recipe, text).unwrap();
    let mut arguments = vec!["prune", &recipe];
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    refused(&arguments, 1, messages);
    assert!(!case.path("out").exists());
}

const DOCUMENTS: &str = "calibration.selection=documents";

fn gzip(path: &Path, chunk: &[u8], times: usize) {
    let mut encoder = GzEncoder::new(File::create(path).unwrap(), Compression::best());
    (0..times).for_each(|_| encoder.write_all(chunk).unwrap());
    encoder.finish().unwrap();
}

fn zstandard(path: &Path, window: u32, chunk: &[u8], times: usize) {
    let mut encoder = zstd::Encoder::new(File::create(path).unwrap(), 1).unwrap();
    encoder.window_log(window).unwrap();
    encoder.long_distance_matching(window > 27).unwrap();
    (0..times).for_each(|_| encoder.write_all(chunk).unwrap());
    encoder.finish().unwrap();
}

#[test]
fn compressed_calibration_texts() {
    let case = with_tokenizer();
    let words = "word ".repeat(1 << 17) + "\n";
    let line = format!("{{\"text\": \"{}\"}}\n", "a".repeat(1 << 12));
    // Texts of 320 MiB, as one line and as many; and documents without end.
    gzip(&case.path("one.txt.gz"), &[b'a'; 1 << 20], 320);
    calibration(&case, "one.txt.gz", &[], &["one.txt.gz, line 1: longer than 16.0 MiB"]);
    gzip(&case.path("many.txt.gz"), words.as_bytes(), 512);
    calibration(&case, "many.txt.gz", &[], &["many.txt.gz: more than 64.0 MiB of text"]);
    gzip(&case.path("a.jsonl.gz"), line.repeat(64).as_bytes(), 1280);
    let bomb = ["a.jsonl.gz, line", "expands to more than 250 times its size"];
    calibration(&case, "a.jsonl.gz", &[DOCUMENTS], &bomb);
    zstandard(&case.path("one.jsonl.zst"), 20, &[b' '; 1 << 20], 2048);
    calibration(&case, "one.jsonl.zst", &[DOCUMENTS], &["line 1: longer than 16.0 MiB"]);
    zstandard(&case.path("many.jsonl.zst"), 26, line.repeat(64).as_bytes(), 2048);
    calibration(
        &case,
        "many.jsonl.zst",
        &[DOCUMENTS],
        &["many.jsonl.zst, line", "expands to more than 250 times its size"],
    );
    zstandard(&case.path("window.txt.zst"), 30, words.as_bytes(), 4);
    calibration(&case, "window.txt.zst", &[], &["wants more memory than the 128 MiB"]);
}

/// Long texts, whose tokens take far more memory than they do.
#[test]
fn long_calibration_texts() {
    let case = with_tokenizer();
    let write = |name: &str, text: &str| fs::write(case.path(name), text).unwrap();
    write("word.txt", &"x".repeat(15 << 20));
    let endless = ["tokenizer.json: no word ends within 2.0 MiB of the text"];
    calibration(&case, "word.txt", &[], &endless);
    let short = ["calibration.sequence_length=16000000"];
    write("words.txt", &("word ".repeat(3 << 18) + "\n").repeat(16));
    calibration(&case, "words.txt", &short, &["words.txt: too little text"]);
    // Documents of almost 16 MiB each, in the largest window that there may be.
    let words = (0u32..3 << 19).map(|i| format!("{:08x} ", i.wrapping_mul(i) ^ i << 9));
    let document = format!("{{\"text\": \"{}\"}}\n", words.collect::<String>());
    zstandard(&case.path("a.jsonl.zst"), 27, document.as_bytes(), 12);
    let many = [DOCUMENTS, "calibration.samples=13"];
    calibration(&case, "a.jsonl.zst", &many, &["a.jsonl.zst", "13"]);
}

#[test]
fn calibration_texts() {
    let case = with_tokenizer();
    let write = |name: &str, bytes: &[u8]| fs::write(case.path(name), bytes).unwrap();
    write("a.txt", b"fine\n\xff\xfe\n");
    calibration(&case, "a.txt", &[], &["a.txt, line 2: not UTF-8 text"]);
    write("a.jsonl", b"{\"text\": \"fine\"}\n{\"text\": \"\xc3\x28\"}\n");
    calibration(&case, "a.jsonl", &[DOCUMENTS], &["a.jsonl, line 2: not UTF-8 text"]);
    write("b.jsonl", format!("{{\"a\":[{}0]}}", "0,".repeat(1 << 20)).as_bytes());
    calibration(&case, "b.jsonl", &[], &["b.jsonl, line 1: more than 262144 values"]);
    write("c.jsonl", "{\"a\":".repeat(1 << 20).as_bytes());
    calibration(&case, "c.jsonl", &[], &["c.jsonl, line 1: "]);
    write("d.jsonl", format!("{}{}", "[".repeat(1000), "]".repeat(1000)).as_bytes());
    calibration(&case, "d.jsonl", &[], &["d.jsonl, line 1: expected a JSON object"]);
    sparse(&case.path("e.txt"), 1 << 30);
    calibration(&case, "e.txt", &[], &["e.txt, line 1: longer than 16.0 MiB"]);
    sparse(&case.path("e.json"), 1 << 30);
    calibration(&case, "e.json", &[], &["larger than 16.0 MiB, the limit for a file of"]);
    write(
        "f.json",
        format!("{{\"token_ids\": [{}]}}", vec!["[0]"; 2_000_000].join(",")).as_bytes(),
    );
    calibration(&case, "f.json", &["calibration.samples=3000000"], &["too little text"]);
    write("g.json", b"{\"token_ids\": [[4294967295, 1], [1, 2]]}");
    calibration(&case, "g.json", &[], &["gives token 4294967295, but the model's vocabulary"]);
    write("a.parquet", b"PAR1\xff\xff\xff\x7fPAR1");
    calibration(&case, "a.parquet", &[], &["a.parquet: not a valid Parquet file"]);
}

#[test]
fn parquet_that_expands() {
    let case = with_tokenizer();
    let fine = fs::read("tests/fixtures/records.parquet").unwrap();
    for at in 0..fine.len() {
        // Any byte of it may be wrong: what is read is bounded.
        if at % 41 == 0 {
            let mut damaged = fine.clone();
            damaged[at] = 0xff;
            let path = case.path("a.parquet");
            fs::write(&path, damaged).unwrap();
            let text = llm_barber::calibration::Text::from(path.as_path());
            let _ = text.read();
        }
    }
    // A schema as deep as the stack, and a footer that says that it has 2 GiB.
    let element = [0x48, 1, b'a', 0x15, 2, 0];
    let mut footer = vec![0x15, 2, 0x19, 0xfc, 0xa0, 0x8d, 0x06];
    footer.extend(element.repeat(100_000));
    let file = |footer: &[u8], length: u32| {
        [&b"PAR1"[..], footer, &length.to_le_bytes(), b"PAR1"].concat()
    };
    let length = u32::try_from(footer.len()).unwrap();
    fs::write(case.path("deep.parquet"), file(&footer, length)).unwrap();
    calibration(&case, "deep.parquet", &[], &["a schema of 100000 elements; at most 256 are read"]);
    sparse(&case.path("large.parquet"), 3 << 30);
    let mut large = fs::OpenOptions::new().append(true).open(case.path("large.parquet")).unwrap();
    large.write_all(&file(&[], 2 << 30)[4..]).unwrap();
    calibration(&case, "large.parquet", &[], &["a footer of 2147483648 bytes; at most 4194304"]);
}

/// Writes a Parquet file of one column of texts and one of lists, its pages compressed.
fn parquet(path: &Path, text: &str, rows: usize, list: usize) {
    use parquet::{
        basic::{Compression, ZstdLevel},
        column::writer::ColumnWriter,
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };
    let schema = "message m { required binary text (utf8); repeated int32 list; }";
    let schema = std::sync::Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_dictionary_enabled(false)
        .set_data_page_size_limit(usize::MAX)
        .set_data_page_row_count_limit(1)
        .set_write_batch_size(usize::MAX)
        .build();
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, properties.into()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    while let Some(mut column) = group.next_column().unwrap() {
        match column.untyped() {
            ColumnWriter::ByteArrayColumnWriter(column) => {
                for _ in 0..rows {
                    column.write_batch(&[text.into()], None, None).unwrap();
                }
            }
            ColumnWriter::Int32ColumnWriter(column) => {
                // One list of so many, and empty ones.
                let mut repetitions = vec![1; list];
                repetitions[0] = 0;
                column
                    .write_batch(&vec![7; list], Some(&vec![1; list]), Some(&repetitions))
                    .unwrap();
                let none = vec![0; rows - 1];
                column.write_batch(&[], Some(&none), Some(&none)).unwrap();
            }
            _ => unreachable!(),
        }
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn parquet_in_few_bytes() {
    let case = with_tokenizer();
    // Pages that expand to megabytes each, of which one is held at a time; and columns that are not
    // wanted are not looked at.
    parquet(&case.path("pages.parquet"), &"e ".repeat(4 << 20), 40, 5 << 20);
    assert!(fs::metadata(case.path("pages.parquet")).unwrap().len() < 1 << 20);
    calibration(&case, "pages.parquet", &[], &["more than 64.0 MiB of text"]);
    // One list of millions of values.
    let task = format!("piqa={}", case.shown("pages.parquet"));
    let model = case.shown("model");
    refused(&["eval", &model, "--task", &task], 1, &["more than 4194304 values in lists"]);
}

#[test]
fn numbers_that_are_none() {
    let recipe = |case: &Case| util::recipe(case.dir.path(), "");
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let case = Case::new();
        let set = tiny(case.dir.path(), |tensors, _| {
            let (_, _, bytes) = tensors.get_mut("model.layers.1.mlp.up_proj.weight").unwrap();
            bytes[4 * (64 * 3 + 5)..][..4].copy_from_slice(&value.to_le_bytes());
        });
        let message = format!("tensor `model.layers.1.mlp.up_proj.weight` has {shown} at [3, 5]");
        refused(&["prune", &recipe(&case), "--set", &set], 1, &[&message]);
    }
    // In tensors of which nothing, or a part, is read: at the start.
    for name in [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ] {
        let case = Case::new();
        let set = tiny(case.dir.path(), |tensors, _| {
            let (_, _, bytes) = tensors.get_mut(name).unwrap();
            let last = bytes.len() - 4;
            bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
        });
        let recipe = recipe(&case);
        let exclude = "sparsity.exclude=['model.layers.0.mlp.up_proj*']";
        for command in ["check", "prune"] {
            let arguments = [command, &recipe, "--set", &set, "--set", exclude];
            refused(&arguments, 1, &[&format!("tensor `{name}` has NaN at [")]);
        }
        assert!(!case.path("out").exists());
        let (shown, _) = measured(&["inspect", &case.shown("model")]);
        assert_eq!(shown.status, 0);
        let said = format!("{name}: 1 of ");
        assert!(shown.stdout.contains(&said), "{}", shown.stdout);
    }
    // What the model has no use for is copied, and said.
    let case = Case::new();
    let set = tiny(case.dir.path(), |tensors, _| {
        let nan = f32::NAN.to_le_bytes().to_vec();
        tensors.insert("buffer".into(), (safetensors::Dtype::F32, vec![1], nan));
    });
    let (run, _) = measured(&["prune", &recipe(&case), "--set", &set]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(flat(&run.stderr).contains("`buffer` has NaN at [0]"), "{}", run.stderr);
    // Finite weights whose activations are not: of a part, and within one.
    for (name, what) in [
        ("model.layers.0.mlp.down_proj.weight", "the output of `model.layers.0.mlp.down_proj"),
        ("model.layers.1.self_attn.v_proj.weight", "the input of `model.layers.1.self_attn.o_pr"),
    ] {
        let case = Case::new();
        let set = tiny(case.dir.path(), |tensors, _| {
            let (_, _, bytes) = tensors.get_mut(name).unwrap();
            bytes.chunks_mut(4).for_each(|b| b.copy_from_slice(&3e38f32.to_le_bytes()));
        });
        let wanda = ["--set", "mask.init=wanda"];
        let recipe = recipe(&case);
        let arguments = [&["prune", &recipe, "--set", &set][..], &wanda].concat();
        refused(&arguments, 1, &[what, "on sample 0, at token 0, channel", "overflow f32"]);
        assert!(!case.path("out").exists());
    }
}
