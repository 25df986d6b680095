//! Models by their names, from a small server that speaks the hub's protocol.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use util::{Run, command, flat, output, tensors};

const MODEL: &str = "recipes/quickstart/model";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";
const TOKEN: &str = "secret-token";

/// A request: its path, and its headers by their names in small letters.
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

impl Request {
    fn is_for(&self, file: &str) -> bool {
        self.path.ends_with(&format!("/resolve/{COMMIT}/{file}"))
    }

    /// The bytes that are asked for.
    fn range(&self, size: usize) -> (usize, usize) {
        let range = self.headers["range"].strip_prefix("bytes=").unwrap();
        let (start, end) = range.split_once('-').unwrap();
        (start.parse().unwrap(), end.parse().map_or(size, |end: usize| size.min(end + 1)))
    }

    /// Whether it asks about a file, and not for its bytes.
    fn is_question(&self) -> bool {
        self.headers.get("range").is_some_and(|range| range == "bytes=0-0")
    }
}

/// What a server sends: in what pieces, and how long it waits after each.
struct Reply {
    pieces: Vec<Vec<u8>>,
    pause: Duration,
}

impl Reply {
    fn new(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let length = body.len().to_string();
        let known = headers.iter().any(|(name, _)| *name == "Content-Length");
        let length = (!known).then_some(("Content-Length", &*length));
        let headers = headers.iter().copied().chain(length);
        let headers: String = headers
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| format!("{name}: {value}\r\n"))
            .collect();
        let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n{headers}\r\n");
        Self { pieces: vec![head.into(), body.to_vec()], pause: Duration::ZERO }
    }

    fn redirect(location: &str) -> Self {
        Self::new(302, &[("Location", location)], b"")
    }

    /// The first bytes of this, and then nothing more for longer than any test waits.
    fn stalled(mut self, bytes: usize) -> Self {
        let mut all = self.pieces.concat();
        all.truncate(bytes);
        self.pieces = vec![all];
        self.pause = Duration::from_secs(60);
        self
    }
}

type Hook = Box<dyn Fn(&Request) -> Option<Reply> + Send>;

/// What the server does, and what it was asked.
#[derive(Default)]
struct State {
    files: HashMap<String, Vec<u8>>,
    /// Bytes after which a file's body is cut off.
    cut: Option<usize>,
    /// How long each piece of a file's body takes.
    pause: Duration,
    /// The status of every answer, if not the right one.
    status: Option<u16>,
    /// Answers of its own.
    hook: Option<Hook>,
    token: Option<String>,
    requests: Vec<String>,
    /// The ranges of the weights that were asked for.
    ranges: Vec<String>,
}

struct Hub {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let mut state = State::default();
        for file in fs::read_dir(MODEL).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            state.files.insert(name, fs::read(path).unwrap());
        }
        state.files.insert("pytorch_model.bin".into(), b"pickle".to_vec());
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = shared.clone();
                thread::spawn(move || serve(stream.unwrap(), &shared));
            }
        });
        Self { address, state }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// Lets a hook answer what it wants to.
    fn hook(&self, hook: impl Fn(&Request) -> Option<Reply> + Send + 'static) {
        self.set(|state| state.hook = Some(Box::new(hook)));
    }

    /// The paths asked for since the last time.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    fn token(&self) -> Option<String> {
        self.state.lock().unwrap().token.clone()
    }

    fn weights(&self) -> Vec<u8> {
        self.state.lock().unwrap().files[WEIGHTS].clone()
    }
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(line) = lines.next() else { return };
    let mut headers = HashMap::new();
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap();
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let request = Request { path: line.split(' ').nth(1).unwrap().to_owned(), headers };
    let reply = answer(&request, &mut state.lock().unwrap());
    for piece in reply.pieces {
        if stream.write_all(&piece).is_err() {
            return;
        }
        thread::sleep(reply.pause);
    }
}

fn answer(request: &Request, state: &mut State) -> Reply {
    state.requests.push(request.path.clone());
    state.token = request.headers.get("authorization").cloned();
    if request.is_for(WEIGHTS) && !request.is_question() {
        state.ranges.push(request.headers["range"].clone());
    }
    if let Some(status) = state.status {
        return Reply::new(status, &[], b"");
    }
    if let Some(reply) = state.hook.as_ref().and_then(|hook| hook(request)) {
        return reply;
    }
    if request.path.starts_with("/api/models/org/tiny/revision/") {
        return listing(state.files.keys(), COMMIT);
    }
    let file = request.path.strip_prefix("/org/tiny/resolve/").and_then(|p| p.split_once('/'));
    match file.and_then(|(_, name)| Some((name, state.files.get(name)?))) {
        None => Reply::new(404, &[], b""),
        Some((name, bytes)) => {
            let (start, end) = request.range(bytes.len());
            let sent = state.cut.map_or(end, |cut| end.min(start + cut));
            let mut reply = file_reply(request, bytes, (&etag(name, bytes), COMMIT));
            let body = reply.pieces.pop().unwrap();
            let pieces = body[..sent - start].chunks(16 << 10);
            reply.pieces.extend(pieces.map(<[u8]>::to_vec));
            reply.pause = if request.is_question() { Duration::ZERO } else { state.pause };
            reply
        }
    }
}

fn listing<N: AsRef<str>>(names: impl Iterator<Item = N>, commit: &str) -> Reply {
    let siblings: Vec<_> = names.map(|name| json!({ "rfilename": name.as_ref() })).collect();
    Reply::new(200, &[], json!({ "sha": commit, "siblings": siblings }).to_string().as_bytes())
}

/// The bytes of a file that are asked for, with an ETag, of a commit.
fn file_reply(request: &Request, bytes: &[u8], (etag, commit): (&str, &str)) -> Reply {
    let (start, end) = request.range(bytes.len());
    let range = format!("bytes {start}-{}/{}", end - 1, bytes.len());
    let headers = [("ETag", etag), ("x-repo-commit", commit), ("Content-Range", &range)];
    Reply::new(206, &headers, &bytes[start..end])
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the hub names contents by.
fn etag(name: &str, bytes: &[u8]) -> String {
    if name.ends_with(".safetensors") {
        return format!("\"{}\"", hexadecimal(&Sha256::digest(bytes)));
    }
    let git = Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(bytes);
    format!("\"{}\"", hexadecimal(&git.finalize()))
}

/// All files below a directory, with what they are.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push((path.clone(), fs::read(&path).unwrap_or_default())),
        }
    }
    found.sort();
    found
}

/// Looks at the model on the hub.
const INSPECT: [&str; 2] = ["inspect", "org/tiny"];

/// Seconds after which a stall is one.
const SHORT: [(&str, &str); 2] = [("HF_HUB_ETAG_TIMEOUT", "1"), ("HF_HUB_DOWNLOAD_TIMEOUT", "1")];

#[track_caller]
fn succeeds(run: &Run) {
    assert_eq!(run.status, 0, "{}", run.stderr);
}

#[track_caller]
fn fails(run: &Run, expected: &str) {
    let message = flat(&run.stderr);
    assert!(run.status == 1 && message.contains(expected), "no {expected:?} in: {message}");
    assert!(!message.contains("panicked") && !message.contains(TOKEN), "{message}");
}

/// Asks for the model on the hub.
const EVAL: [&str; 8] = [
    "eval",
    "org/tiny",
    "--text",
    "recipes/quickstart/evaluation.txt",
    "--segments",
    "1",
    "--sequence-length",
    "64",
];

/// Runs the program with a hub and a cache of its own.
fn barber(hub: &Hub, home: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Run {
    let mut command = command(Path::new(env!("CARGO_BIN_EXE_barber")));
    command.env("HF_HOME", home).env("HF_ENDPOINT", &hub.address).envs(variables.iter().copied());
    output(command.args(arguments))
}

fn prune<'a>(model: &'a str, out: &'a str) -> Vec<&'a str> {
    vec![
        "prune",
        "recipes/quickstart.toml",
        "--set",
        model,
        "--set",
        out,
        "--set",
        "calibration.samples=2",
    ]
}

#[test]
fn a_model_is_fetched_once() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let home = dir.path().join("home");
    let out = |name: &str| format!("output.path={}", dir.path().join(name).display());
    let (fetched, local, again) = (out("fetched"), out("local"), out("again"));
    let token = [("HF_TOKEN", TOKEN)];
    let run = barber(&hub, &home, &prune("model.path=org/tiny", &fetched), &token);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert_eq!(hub.token().unwrap(), format!("Bearer {TOKEN}"));
    assert!(!hub.requests().iter().any(|path| path.ends_with(".bin")));
    let of_directory = format!("model.path={MODEL}");
    let run = barber(&hub, &home, &prune(&of_directory, &local), &[]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(hub.requests().is_empty());
    assert_eq!(tensors(&dir.path().join("fetched")), tensors(&dir.path().join("local")));
    assert!(!fs::symlink_metadata(dir.path().join("fetched/config.json")).unwrap().is_symlink());

    // The resolved recipe names the commit; all of it is in the cache.
    let resolved = dir.path().join("fetched/barber-recipe.toml");
    let text = fs::read_to_string(&resolved).unwrap();
    assert!(text.contains("path = \"org/tiny\"") && text.contains(COMMIT), "{text}");
    let arguments = ["prune", resolved.to_str().unwrap(), "--set", &again];
    let run = barber(&hub, &home, &arguments, &[]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert_eq!(hub.requests(), [format!("/api/models/org/tiny/revision/{COMMIT}")]);

    // Without the hub.
    let offline = [("HF_HUB_OFFLINE", "1")];
    let run = barber(&hub, &home, &EVAL, &offline);
    assert_eq!((run.status, hub.requests().len()), (0, 0), "{}", run.stderr);
    let run = barber(&hub, &dir.path().join("empty"), &EVAL, &offline);
    let message = flat(&run.stderr);
    assert!(run.status == 1 && message.contains("HF_HUB_OFFLINE forbids"), "{message}");
    let gone = [("HF_ENDPOINT", "http://127.0.0.1:9")];
    let run = barber(&hub, &home, &EVAL, &gone);
    assert!(run.status == 0 && run.stderr.contains("using the cached org/tiny"), "{}", run.stderr);
    let run = barber(&hub, &dir.path().join("empty"), &EVAL, &gone);
    assert!(run.status == 1 && run.stderr.contains("could not be fetched"), "{}", run.stderr);
}

#[test]
fn a_download_goes_on_where_it_was_cut_off() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.set(|state| state.cut = Some(20_000));
    let run = barber(&hub, dir.path(), &EVAL, &[]);
    fails(&run, "could not be fetched: model.safetensors: cut off at 60000 of");
    assert!(flat(&run.stderr).contains("what has arrived is kept"), "{}", run.stderr);
    let snapshot = dir.path().join(format!("hub/models--org--tiny/snapshots/{COMMIT}"));
    assert!(!snapshot.join(WEIGHTS).exists());
    hub.set(|state| state.cut = None);
    succeeds(&barber(&hub, dir.path(), &EVAL, &[]));
    let ranges = ["bytes=0-", "bytes=20000-", "bytes=40000-", "bytes=60000-"];
    assert_eq!(hub.state.lock().unwrap().ranges, ranges);
    assert_eq!(tensors(&snapshot), tensors(Path::new(MODEL)));
    // As the hub's own tools have it: contents by their digests, links by names.
    let blob = fs::read_link(snapshot.join(WEIGHTS)).unwrap();
    let digest = hexadecimal(&Sha256::digest(hub.weights()));
    assert_eq!(blob, Path::new("../../blobs").join(digest));
}

#[test]
fn what_the_hub_refuses_is_said() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let fails = |arguments: &[&str], expected: &[&str]| {
        let run = barber(&hub, dir.path(), arguments, &[]);
        let message = flat(&run.stderr);
        assert_eq!(run.status, 1, "{message}");
        for expected in expected {
            assert!(message.contains(expected), "no {expected:?} in: {message}");
        }
    };
    let text = "recipes/quickstart/evaluation.txt";
    let asking = |name| ["eval", name, "--text", text];
    fails(&asking("org/other"), &["no directory `org/other` here", "no model of this name"]);
    let of_directory = ["eval", MODEL, "--text", text, "--revision", "x"];
    fails(&of_directory, &["a directory has no revisions"]);
    for status in [401, 403] {
        hub.set(|state| state.status = Some(status));
        fails(&asking("org/tiny"), &["HF_TOKEN", "gated", &status.to_string()]);
    }
    hub.set(|state| state.status = Some(500));
    fails(&asking("org/tiny"), &["could not be fetched", "500"]);
    hub.set(|state| {
        state.status = None;
        state.files.remove("model.safetensors");
    });
    hub.requests();
    fails(&asking("org/tiny"), &["pickle (pytorch_model.bin)", "can run code"]);
    assert_eq!(hub.requests().len(), 1);
}

/// What cannot be pruned is not fetched: weights take long.
#[test]
fn a_model_that_barber_does_not_read_is_refused_before_its_weights_are_fetched() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    for (key, value, expected) in [
        ("model_type", "mamba", "unknown `model_type` \"mamba\""),
        ("quantization_config", r#"{"quant_method": "mxfp4"}"#, "Mxfp4Config(dequantize=True)"),
    ] {
        hub.set(|state| {
            let config = fs::read(Path::new(MODEL).join("config.json")).unwrap();
            let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
            config[key] = serde_json::from_str(value).unwrap_or_else(|_| value.into());
            state.files.insert("config.json".into(), config.to_string().into_bytes());
        });
        hub.requests();
        let home = dir.path().join(key);
        let out = format!("output.path={}", dir.path().join("out").display());
        for arguments in [&EVAL[..], &prune("model.path=org/tiny", &out)] {
            let run = barber(&hub, &home, arguments, &[]);
            fails(&run, "`org/tiny` on the hub is not fetched");
            fails(&run, expected);
        }
        let requests = hub.requests();
        assert!(requests.iter().any(|path| path.ends_with("config.json")), "{requests:?}");
        assert!(!requests.iter().any(|path| path.ends_with(WEIGHTS)), "{requests:?}");
        // Its tensors can still be looked at.
        succeeds(&barber(&hub, &home, &["inspect", "org/tiny"], &[]));
    }
}

#[test]
fn no_answer_is_a_path_out_of_the_cache() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let victim = dir.path().join("victim");
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("keys"), "old").unwrap();
    let (home, absolute) = (dir.path().join("home"), victim.join("new").display().to_string());
    let untouched = |what: &str| {
        let all = files(dir.path()).into_iter().filter(|(path, _)| !path.starts_with(&home));
        assert_eq!(all.collect::<Vec<_>>(), [(victim.join("keys"), b"old".to_vec())], "{what}");
        let _ = fs::remove_dir_all(&home);
    };
    for etag in ["../../../../victim/keys", &absolute, "..", ".", "", "a/b", "../../../../victim/x"]
    {
        for quoted in [etag.to_owned(), format!("\"{etag}\"")] {
            let told = quoted.clone();
            hub.hook(move |request| {
                let known = (&*told, COMMIT);
                request.is_for("config.json").then(|| file_reply(request, b"{}", known))
            });
            fails(&barber(&hub, &home, &INSPECT, &[]), "ETag");
            untouched(&quoted);
        }
    }
    for commit in ["../../../../victim", &absolute, "main", &"0".repeat(40)] {
        let told = commit.to_owned();
        hub.hook(move |request| {
            let known = (&*etag("config.json", b"{}"), &*told);
            request.is_for("config.json").then(|| file_reply(request, b"{}", known))
        });
        fails(&barber(&hub, &home, &INSPECT, &[]), "answered for the commit");
        untouched(commit);
    }
    for sha in ["../../../../victim", &absolute, "main", "", "deadbeef"] {
        let told = sha.to_owned();
        hub.hook(move |request| {
            request.path.starts_with("/api").then(|| listing([WEIGHTS].iter(), &told))
        });
        fails(&barber(&hub, &home, &INSPECT, &[]), "calls the commit");
        untouched(sha);
    }
    // Odd names do not stop the others.
    let names = ["../../../../victim/x.json", &absolute, "a/b.json", "..", "a\u{1b}[2J.json", ""];
    let model = fs::read_dir(MODEL).unwrap();
    let model = model.map(|file| file.unwrap().file_name().into_string().unwrap());
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).chain(model).collect();
    hub.hook(move |request| {
        request.path.starts_with("/api").then(|| listing(names.iter(), COMMIT))
    });
    let run = barber(&hub, &home, &INSPECT, &[]);
    succeeds(&run);
    assert!(!run.stderr.contains('\u{1b}'));
    untouched("names");
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let (hub, other, dir) = (Hub::start(), Hub::start(), tempfile::tempdir().unwrap());
    // A host that answers for files, as the hub's own do.
    let elsewhere = other.address.clone();
    hub.hook(move |request| {
        let path = request.path.strip_prefix("/org/tiny/resolve/moved").map(str::to_owned);
        match path {
            Some(path) => Some(Reply::redirect(&format!("{elsewhere}/org/tiny/resolve{path}"))),
            None if request.path.contains("/resolve/") => {
                let (_, rest) = request.path.split_once("/resolve").unwrap();
                // Relative to the hub first, where it is still wanted.
                Some(Reply::redirect(&format!("/org/tiny/resolve/moved{rest}")))
            }
            None => None,
        }
    });
    let token = [("HF_TOKEN", TOKEN)];
    succeeds(&barber(&hub, &dir.path().join("a"), &INSPECT, &token));
    assert_eq!(hub.token().unwrap(), format!("Bearer {TOKEN}"));
    assert!(!other.requests().is_empty());
    assert_eq!(other.token(), None);
    // Nor does it come back, once a request was elsewhere.
    let elsewhere = other.address.clone();
    hub.hook(move |request| {
        let away = request.path.starts_with("/api") && !request.path.contains("back");
        away.then(|| Reply::redirect(&format!("{elsewhere}/api/away")))
    });
    let back = hub.address.clone();
    other
        .hook(move |_| Some(Reply::redirect(&format!("{back}/api/models/org/tiny/revision/back"))));
    hub.set(|state| state.files.retain(|name, _| name.ends_with(".bin")));
    fails(&barber(&hub, &dir.path().join("b"), &INSPECT, &token), "pickle");
    assert_eq!((hub.token(), other.token()), (None, None));
}

#[test]
fn a_token_is_trimmed_and_never_shown() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    for (variable, sent) in [(format!("{TOKEN}\n"), true), (" \n".into(), false)] {
        let home = dir.path().join(sent.to_string());
        succeeds(&barber(&hub, &home, &INSPECT, &[("HF_TOKEN", &variable)]));
        assert_eq!(hub.token(), sent.then(|| format!("Bearer {TOKEN}")));
    }
    for broken in [format!("{TOKEN}\nx"), format!("{TOKEN} x"), format!("{TOKEN}\u{fc}")] {
        let run = barber(&hub, dir.path(), &INSPECT, &[("HF_TOKEN", &broken)]);
        fails(&run, "HF_TOKEN: a token has no spaces");
    }
}

#[test]
fn redirects_come_to_an_end() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let address = hub.address.clone();
    hub.hook(move |request| Some(Reply::redirect(&format!("{address}{}", request.path))));
    fails(&barber(&hub, dir.path(), &INSPECT, &[]), "redirects more than 10 times");
    assert_eq!(hub.requests().len(), 11);
    hub.hook(|request| request.path.contains("/resolve/").then(|| Reply::redirect(&request.path)));
    fails(&barber(&hub, dir.path(), &INSPECT, &[]), "redirects more than 10 times");
    for status in [300, 301, 302, 304, 308] {
        hub.hook(move |request| {
            request.path.contains("/resolve/").then(|| Reply::new(status, &[("ETag", "x")], b""))
        });
        let expected = format!("(status {status}) without a Location");
        fails(&barber(&hub, dir.path(), &INSPECT, &[]), &expected);
    }
    for location in ["file:///etc/passwd", "http://", "::::", "http://[::1", "https://u@h/x"] {
        hub.hook(move |_| Some(Reply::redirect(location)));
        fails(&barber(&hub, dir.path(), &INSPECT, &[]), "is not a URL of HTTP");
    }
}

#[test]
fn a_stall_ends_with_a_message() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    for (path, bytes) in [("/api/", 0), ("/api/", 12), ("/api/", 120), ("/resolve/", 0)] {
        hub.hook(move |request| {
            let reply = || listing(["config.json"].iter(), COMMIT);
            request.path.contains(path).then(|| reply().stalled(bytes))
        });
        fails(
            &barber(&hub, dir.path(), &INSPECT, &SHORT),
            "stalled: next to nothing came within 1 s",
        );
    }
    // In the middle of a file, and a byte now and then.
    let bytes = hub.weights();
    hub.hook(move |request| {
        let named = etag(WEIGHTS, &bytes);
        let reply = || file_reply(request, &bytes, (&named, COMMIT)).stalled(30_000);
        (request.is_for(WEIGHTS) && !request.is_question()).then(reply)
    });
    fails(&barber(&hub, dir.path(), &INSPECT, &SHORT), "model.safetensors: stalled");
    let bytes = hub.weights();
    hub.hook(move |request| {
        if !request.is_for(WEIGHTS) || request.is_question() {
            return None;
        }
        let mut reply = file_reply(request, &bytes, (&etag(WEIGHTS, &bytes), COMMIT));
        let body = reply.pieces.pop().unwrap();
        reply.pieces.extend(body.iter().map(|byte| vec![*byte]));
        reply.pause = Duration::from_millis(100);
        Some(reply)
    });
    fails(&barber(&hub, dir.path(), &INSPECT, &SHORT), "model.safetensors: stalled");
    // What had arrived is used.
    hub.set(|state| {
        state.hook = None;
        state.ranges.clear();
    });
    succeeds(&barber(&hub, dir.path(), &INSPECT, &SHORT));
    let ranges = hub.state.lock().unwrap().ranges.clone();
    assert!(ranges.len() == 1 && ranges[0] != "bytes=0-", "{ranges:?}");
    for variable in ["HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"] {
        for wrong in ["soon", "0", "-1", "inf", "nan"] {
            let run = barber(&hub, dir.path(), &INSPECT, &[(variable, wrong)]);
            fails(&run, &format!("{variable}: must be a number of seconds > 0"));
        }
    }
}

#[test]
fn sizes_and_digests_are_those_that_were_announced() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let good = hub.weights();
    let mut other = good.clone();
    let last = other.len() - 1;
    other[last] ^= 1;
    let named = etag(WEIGHTS, &good);
    let size = good.len();
    let range = format!("bytes 0-{}/{size}", size - 1);
    let long = [&good[..], b"more"].concat();
    let (more, less) = ((size + 4).to_string(), (size - 4).to_string());
    let huge = format!("bytes 0-{}/{}", size - 1, u64::MAX);
    let with = |range: &str, length: &str, body: &[u8]| -> Vec<Vec<u8>> {
        let headers = [("ETag", &*named), ("Content-Range", range), ("Content-Length", length)];
        Reply::new(206, &headers, body).pieces
    };
    let endless = vec![b'x'; 64 << 20];
    for (pieces, expected) in [
        (with(&range, &size.to_string(), &other), "do not match the hub's digest"),
        (with(&range, "", &long), "sends more than"),
        (with(&range, "", &endless), "sends more than"),
        (with(&range, &more, &long), "announces"),
        (with(&range, &less, &good), "announces"),
        (with(&huge, &size.to_string(), &good), "announces"),
    ] {
        hub.hook(move |request| {
            let reply = || Reply { pieces: pieces.clone(), pause: Duration::ZERO };
            (request.is_for(WEIGHTS) && !request.is_question()).then(reply)
        });
        fails(&barber(&hub, dir.path(), &INSPECT, &[]), expected);
        let all: usize = files(dir.path()).iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(all < 2 * size, "{all}");
    }
    // Small files have git's digest.
    hub.hook(|request| {
        let known = (&*etag("config.json", b"{ }"), COMMIT);
        request.is_for("config.json").then(|| file_reply(request, b"{}}", known))
    });
    let home = dir.path().join("other");
    fails(
        &barber(&hub, &home, &INSPECT, &[]),
        "config.json: its bytes do not match the hub's digest",
    );
    hub.set(|state| state.hook = None);
    succeeds(&barber(&hub, dir.path(), &INSPECT, &[]));
    // The list of files has its limit.
    let names: Vec<String> = (0..5000).map(|i| format!("{i}.json")).collect();
    hub.hook(move |_| Some(listing(names.iter(), COMMIT)));
    fails(&barber(&hub, &home, &INSPECT, &[]), "lists 5000 files");
    let endless = vec![b' '; 32 << 20];
    hub.hook(move |_| Some(Reply::new(200, &[], &endless)));
    fails(&barber(&hub, &home, &INSPECT, &[]), "larger than 16 MiB");
}

#[test]
fn a_damaged_part_is_fetched_again() {
    let hub = Hub::start();
    let bytes = hub.weights();
    let digest = hexadecimal(&Sha256::digest(&bytes));
    for (what, part) in [
        ("damaged", vec![0; 5000]),
        ("damaged", vec![0; bytes.len()]),
        ("", vec![0; bytes.len() + 1]),
        ("", bytes[..5000].to_vec()),
        ("", bytes.clone()),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let blobs = dir.path().join("hub/models--org--tiny/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{digest}.part")), &part).unwrap();
        let run = barber(&hub, dir.path(), &INSPECT, &[]);
        succeeds(&run);
        assert_eq!(run.stderr.contains("damaged"), !what.is_empty(), "{}", run.stderr);
        assert_eq!(fs::read(blobs.join(&digest)).unwrap(), bytes);
        assert_eq!(fs::read_dir(&blobs).unwrap().count(), fs::read_dir(MODEL).unwrap().count());
    }
    // A link in its place is not written through, and contents of another size are no contents.
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("home/hub/models--org--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(dir.path().join("victim"), "old").unwrap();
    let part = blobs.join(format!("{digest}.part"));
    std::os::unix::fs::symlink(dir.path().join("victim"), part).unwrap();
    fs::write(blobs.join(&digest), "short").unwrap();
    succeeds(&barber(&hub, &dir.path().join("home"), &INSPECT, &[]));
    assert_eq!(fs::read_to_string(dir.path().join("victim")).unwrap(), "old");
    assert_eq!(fs::read(blobs.join(&digest)).unwrap(), bytes);
}

#[test]
fn one_process_waits_for_another() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    hub.set(|state| state.pause = Duration::from_millis(100));
    let runs: Vec<_> = (0..3)
        .map(|_| {
            let mut command = command(Path::new(env!("CARGO_BIN_EXE_barber")));
            command.env("HF_HOME", dir.path()).env("HF_ENDPOINT", &hub.address).args(INSPECT);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let mut waited = 0;
    for run in runs {
        let found = run.wait_with_output().unwrap();
        let message = String::from_utf8(found.stderr).unwrap();
        assert!(found.status.success(), "{message}");
        waited += usize::from(message.contains("another process is fetching it; waiting"));
    }
    assert!(waited > 0);
    assert_eq!(hub.state.lock().unwrap().ranges, ["bytes=0-"]);
}

#[test]
fn a_mirror_without_digests_will_do() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    let model: HashMap<String, Vec<u8>> = hub.state.lock().unwrap().files.clone();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    hub.hook(move |request| {
        let name = request.path.rsplit('/').next()?;
        let bytes = model.get(name).filter(|_| request.path.contains("/resolve/"))?;
        counted.fetch_add(1, Ordering::Relaxed);
        Some(file_reply(request, bytes, (&format!("\"etag-{name}\""), COMMIT)))
    });
    succeeds(&barber(&hub, dir.path(), &INSPECT, &[]));
    let snapshot = dir.path().join(format!("hub/models--org--tiny/snapshots/{COMMIT}"));
    assert_eq!(tensors(&snapshot), tensors(Path::new(MODEL)));
    let once = asked.load(Ordering::Relaxed);
    succeeds(&barber(&hub, dir.path(), &INSPECT, &[]));
    assert_eq!(asked.load(Ordering::Relaxed), once);
}

#[test]
fn a_commit_in_the_cache_is_found_without_the_hub() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    // As the hub's own tools leave it.
    let cache = dir.path().join("hub/models--org--tiny");
    let snapshot = cache.join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(cache.join("refs")).unwrap();
    fs::write(cache.join("refs/main"), COMMIT).unwrap();
    for file in fs::read_dir(MODEL).unwrap() {
        let path = file.unwrap().path();
        fs::copy(&path, snapshot.join(path.file_name().unwrap())).unwrap();
    }
    let offline = [("HF_HUB_OFFLINE", "1")];
    let out = dir.path().join("out").display().to_string();
    let set = format!("output.path={out}");
    for arguments in [
        &prune("model.path=org/tiny", &set)[..],
        &["inspect", "org/tiny", "--revision", COMMIT],
        &["reproduce", &out],
        &["verify", &out, "--dense", "org/tiny"],
    ] {
        succeeds(&barber(&hub, dir.path(), arguments, &offline));
    }
    assert!(hub.requests().is_empty());
    let other = "1".repeat(40);
    let missing = ["inspect", "org/tiny", "--revision", &other];
    fails(&barber(&hub, dir.path(), &missing, &offline), "HF_HUB_OFFLINE forbids");
    fs::write(cache.join("refs/main"), "../../../../../../etc").unwrap();
    fails(&barber(&hub, dir.path(), &INSPECT, &offline), "HF_HUB_OFFLINE forbids");
}

#[test]
fn the_environment_is_checked() {
    let (hub, dir) = (Hub::start(), tempfile::tempdir().unwrap());
    for endpoint in ["nowhere", "ftp://hub", "http://user:hunter2@127.0.0.1"] {
        let run = barber(&hub, dir.path(), &INSPECT, &[("HF_ENDPOINT", endpoint)]);
        fails(&run, "HF_ENDPOINT: must be a URL");
        assert!(!run.stderr.contains("hunter2"), "{}", run.stderr);
    }
    // Without a home there is no usual place.
    let mut alone = command(Path::new(env!("CARGO_BIN_EXE_barber")));
    alone.env("HOME", "no-home").env_remove("XDG_CACHE_HOME").args(INSPECT);
    fails(&output(&mut alone), "set HF_HOME to a directory");
    let mut alone = command(Path::new(env!("CARGO_BIN_EXE_barber")));
    alone.env("HOME", dir.path()).env_remove("XDG_CACHE_HOME").args(INSPECT);
    alone.env("HF_ENDPOINT", format!("{}/", hub.address));
    succeeds(&output(&mut alone));
    let cache = dir.path().join(".cache/huggingface/hub/models--org--tiny");
    assert_eq!(fs::read_to_string(cache.join("refs/main")).unwrap(), COMMIT);
    let elsewhere = dir.path().join("elsewhere");
    alone.env("HF_HUB_CACHE", &elsewhere);
    succeeds(&output(&mut alone));
    assert!(elsewhere.join("models--org--tiny/refs/main").exists());
}
