//! Models by their names, from a small server that speaks the hub's protocol.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod util;

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use util::{Run, command, flat, output, tensors};

const MODEL: &str = "recipes/quickstart/model";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does, and what it was asked.
#[derive(Default)]
struct State {
    files: HashMap<String, Vec<u8>>,
    /// Bytes after which a file's body is cut off.
    cut: Option<usize>,
    /// The status of every answer, if not the right one.
    status: Option<u16>,
    token: Option<String>,
    requests: Vec<String>,
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
                answer(stream.unwrap(), &shared);
            }
        });
        Self { address, state }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// The paths asked for since the last time.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let mut headers = HashMap::new();
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap();
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let mut state = state.lock().unwrap();
    state.requests.push(path.clone());
    state.token = headers.get("authorization").cloned();
    let mut reply = |status: u16, extra: &str, body: &[u8], length: usize| {
        let head = format!(
            "HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n\
             x-repo-commit: {COMMIT}\r\n{extra}\r\n"
        );
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    };
    if let Some(status) = state.status {
        return reply(status, "", b"", 0);
    }
    if path.starts_with("/api/models/org/tiny/revision/") {
        let siblings: Vec<_> =
            state.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let info = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        return reply(200, "", info.as_bytes(), info.len());
    }
    let file = path.strip_prefix("/org/tiny/resolve/").and_then(|rest| rest.split_once('/'));
    let Some((name, bytes)) = file.and_then(|(_, name)| Some((name, state.files.get(name)?)))
    else {
        return reply(404, "", b"", 0);
    };
    let range = headers["range"].strip_prefix("bytes=").unwrap();
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(bytes.len(), |end: usize| end + 1);
    let extra = format!(
        "ETag: \"etag-{name}\"\r\nContent-Range: bytes {start}-{}/{}\r\n",
        end - 1,
        bytes.len()
    );
    let sent = state.cut.map_or(end, |cut| end.min(start + cut));
    reply(206, &extra, &bytes[start..sent], end - start);
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
    let token = [("HF_TOKEN", "secret")];
    let run = barber(&hub, &home, &prune("model.path=org/tiny", &fetched), &token);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert_eq!(hub.state.lock().unwrap().token.as_deref(), Some("Bearer secret"));
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
    let message = flat(&run.stderr);
    assert!(run.status == 1 && message.contains("could not be fetched"), "{message}");
    assert!(message.contains("what has arrived is kept"), "{message}");
    let snapshot = dir.path().join(format!("hub/models--org--tiny/snapshots/{COMMIT}"));
    assert!(!snapshot.join("model.safetensors").exists());
    let blobs = fs::read_dir(dir.path().join("hub/models--org--tiny/blobs")).unwrap();
    let names: Vec<_> = blobs.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().any(|name| name.ends_with(".part")), "{names:?}");
    hub.set(|state| state.cut = None);
    let run = barber(&hub, dir.path(), &EVAL, &[]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert_eq!(tensors(&snapshot), tensors(Path::new(MODEL)));
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
