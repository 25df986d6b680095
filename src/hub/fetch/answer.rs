//! Parses and checks the answers of a hub's server, before any part becomes a path or a request.

use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use ureq::http::HeaderMap;

/// Maximum number of files of a checkpoint.
const FILES: usize = 4096;

/// A commit's hash: 40 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Commit(String);

impl Commit {
    /// Parses the hash of a commit; `None` if it is not one.
    pub(super) fn parse(text: &str) -> Option<Self> {
        is_hexadecimal(text, 40).then(|| Self(text.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The name of a file that a checkpoint needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileName(String);

impl FileName {
    /// The name, if a checkpoint needs this file: configuration, tokenizer, licence or safetensors,
    /// not in folders; otherwise `None`.
    fn parse(name: &str) -> Option<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.len() > 200 || name.starts_with('.') || !name.chars().all(plain) {
            return None;
        }
        let other_weights = name.starts_with("pytorch_model") || name.starts_with("consolidated");
        let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
        let known = ["json", "jinja", "md", "model", "safetensors", "txt"].contains(&extension);
        let licence = ["LICENSE", "LICENCE", "NOTICE"].iter().any(|word| name.starts_with(word));
        (!other_weights && (known || licence)).then(|| Self(name.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The files of a repository at a revision.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Listing {
    /// The commit that the revision names.
    pub(super) commit: Commit,
    /// The files that a checkpoint needs.
    pub(super) files: Vec<FileName>,
    /// A file with pickled weights, if there is one.
    pub(super) pickle: Option<String>,
}

impl Listing {
    /// Parses a hub's answer.
    pub(super) fn parse(body: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Value>,
        }
        let answer: Answer = serde_json::from_slice(body)
            .map_err(|error| format!("the hub's list of files cannot be read: {error}"))?;
        let Some(commit) = Commit::parse(&answer.sha) else {
            return Err(format!(
                "the hub calls the commit {:?}, which is not 40 hexadecimal digits",
                short(&answer.sha)
            ));
        };
        let names = || answer.siblings.iter().filter_map(|file| file["rfilename"].as_str());
        let files: Vec<FileName> = names().filter_map(FileName::parse).collect();
        if files.len() > FILES {
            return Err(format!(
                "the hub lists {} files for this checkpoint; at most {FILES} are fetched",
                files.len()
            ));
        }
        let is_pickle = |name: &&str| {
            [".bin", ".pt", ".pth", ".ckpt"].iter().any(|extension| name.ends_with(extension))
        };
        Ok(Self { commit, files, pickle: names().find(is_pickle).map(short) })
    }
}

/// The server's ETag of a file, which determines how the contents are stored and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Etag {
    /// The SHA-256 of the contents, in hexadecimal, for large files.
    Sha256(String),
    /// Git's SHA-1 of a blob with the contents, in hexadecimal, for small files.
    Git(String),
    /// A mirror's own tag, which is not a digest.
    Opaque(String),
}

impl Etag {
    fn parse(header: &str) -> Option<Self> {
        let text = header.strip_prefix("W/").unwrap_or(header);
        let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:+=".contains(c);
        match text {
            text if is_hexadecimal(text, 64) => Some(Self::Sha256(text.into())),
            text if is_hexadecimal(text, 40) => Some(Self::Git(text.into())),
            text if text.starts_with('.') || text.is_empty() || text.len() > 200 => None,
            text if text.chars().all(plain) => Some(Self::Opaque(text.into())),
            _ => None,
        }
    }

    /// The name of the contents in the cache, which a server cannot choose.
    pub(super) fn blob(&self) -> String {
        match self {
            Self::Sha256(digest) | Self::Git(digest) => digest.clone(),
            Self::Opaque(text) => format!("{:x}", Sha256::digest(text)),
        }
    }
}

/// The server's description of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Described {
    pub(super) etag: Etag,
    /// Size in bytes.
    pub(super) size: u64,
}

impl Described {
    /// Whether the headers of a redirect fully describe the file.
    pub(super) fn is_complete(headers: &HeaderMap) -> bool {
        text(headers, "x-linked-etag").is_some() && text(headers, "x-linked-size").is_some()
    }

    /// Parses the headers of an answer with the first byte of a commit's file.
    pub(super) fn parse(headers: &HeaderMap, commit: &Commit) -> Result<Self, String> {
        let header = |name| text(headers, name);
        if let Some(other) = header("x-repo-commit").filter(|other| *other != commit.as_str()) {
            return Err(format!(
                "the hub answered for the commit {:?}, not for {}",
                short(other),
                commit.as_str()
            ));
        }
        let etag = header("x-linked-etag").or_else(|| header("etag"));
        let etag = etag.ok_or("the hub's answer has no ETag")?;
        let etag = Etag::parse(etag).ok_or_else(|| {
            format!("the hub's answer has the ETag {:?}, which is not a digest", short(etag))
        })?;
        let size = header("x-linked-size").or_else(|| {
            let range = header("content-range");
            range.map_or_else(|| header("content-length"), |range| Some(range.rsplit_once('/')?.1))
        });
        let size = size.and_then(|size| size.parse().ok());
        let size = size.ok_or("the hub's answer does not say how large the file is")?;
        Ok(Self { etag, size })
    }
}

/// The offset of an answer's bytes in the file, and the size of the file, from Content-Range.
pub(super) fn content_range(headers: &HeaderMap) -> Option<(u64, u64)> {
    let range = text(headers, "content-range")?.strip_prefix("bytes ")?;
    let (range, size) = range.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, size.parse().ok()?))
}

pub(super) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn is_hexadecimal(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
}

/// The start of a text, for a message.
fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ureq::http::HeaderValue;

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn described(pairs: &[(&'static str, &str)]) -> Result<Described, String> {
        Described::parse(&headers(pairs), &Commit::parse(COMMIT).unwrap())
    }

    #[test]
    fn only_what_a_checkpoint_needs_is_wanted() {
        let wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model"];
        let wanted = wanted.into_iter().chain(["model.safetensors.index.json", "LICENSE"]);
        wanted.for_each(|file| assert!(FileName::parse(file).is_some(), "{file}"));
        let long = format!("{}.json", "a".repeat(300));
        for file in [
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "onnx/model.onnx",
            "consolidated.safetensors",
            "model.gguf",
            ".gitattributes",
            "original/params.json",
            "../evil.json",
            "/evil.json",
            "..",
            "a b.json",
            "x\u{1b}[2J.json",
            "x\0.json",
            "..\\x.json",
            "%2e%2e%2fevil.json",
            &long,
        ] {
            assert!(FileName::parse(file).is_none(), "{file}");
        }
    }

    #[test]
    fn commits_are_whole_hashes() {
        assert!(Commit::parse(COMMIT).is_some());
        for text in ["", "main", "../../../etc", "deadbeef", &COMMIT.to_uppercase(), &COMMIT[1..]] {
            assert!(Commit::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn an_odd_name_in_a_listing_is_passed_over() {
        let body = format!(
            r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "config.json"}}, {{"rfilename": 1}},
            {{"rfilename": "../x.json"}}, {{}}, 7, {{"rfilename": "model.bin"}}]}}"#
        );
        let listing = Listing::parse(body.as_bytes()).unwrap();
        assert_eq!(listing.files, [FileName("config.json".into())]);
        assert_eq!(listing.pickle.as_deref(), Some("model.bin"));
        for wrong in ["", "[", "{}", r#"{"sha": "main", "siblings": []}"#, &"[".repeat(100_000)] {
            assert!(Listing::parse(wrong.as_bytes()).is_err());
        }
        let name = |i: usize| serde_json::json!({ "rfilename": format!("{i}.json") });
        let siblings: Vec<_> = (0..=FILES).map(name).collect();
        let many = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        assert!(Listing::parse(many.as_bytes()).unwrap_err().contains("4097 files"));
    }

    #[test]
    fn etags_are_told_apart() {
        let sha256 = "ab".repeat(32);
        let quoted = format!("\"{sha256}\"");
        assert_eq!(Etag::parse(&quoted), Some(Etag::Sha256(sha256.clone())));
        assert_eq!(Etag::parse(&format!("W/{quoted}")), Some(Etag::Sha256(sha256)));
        assert_eq!(Etag::parse(COMMIT), Some(Etag::Git(COMMIT.into())));
        assert_eq!(Etag::parse("\"a-1.b\""), Some(Etag::Opaque("a-1.b".into())));
        for refused in ["", "\"\"", ".", "..", "a/b", "/abs", "../../victim", "a\\b", "\"a"] {
            assert_eq!(Etag::parse(refused), None, "{refused}");
        }
    }

    #[test]
    fn a_file_is_described_by_its_headers() {
        let sha256 = "ab".repeat(32);
        let linked = [("x-linked-etag", &*sha256), ("etag", "\"z\""), ("x-linked-size", "7")];
        let found = described(&linked).unwrap();
        assert_eq!(found, Described { etag: Etag::Sha256(sha256.clone()), size: 7 });
        let small = [("etag", COMMIT), ("content-range", "bytes 0-0/489"), ("content-length", "1")];
        assert_eq!(described(&small).unwrap().size, 489);
        let empty = [("etag", COMMIT), ("content-range", "bytes */0"), ("x-repo-commit", COMMIT)];
        assert_eq!(described(&empty).unwrap().size, 0);
        for wrong in [
            &[("content-range", "bytes 0-0/489")][..],
            &[("etag", COMMIT)],
            &[("etag", COMMIT), ("content-range", "bytes 0-0/*")],
            &[("etag", COMMIT), ("content-range", "bytes 0-0/99999999999999999999999")],
            &[("etag", COMMIT), ("content-range", "bytes 0-0/1"), ("x-repo-commit", "/etc")],
        ] {
            assert!(described(wrong).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        /// Whatever a server says: no panic, and what becomes a path is a name of one file.
        #[test]
        fn no_answer_becomes_a_path_elsewhere(
            etag in "\\PC{0,80}|[./\\\\a-f0-9\"]{0,80}",
            range in "bytes [0-9*-]{0,30}/?[0-9*]{0,30}|\\PC{0,40}",
            commit in "\\PC{0,60}|[./a-f0-9]{40}",
            name in "\\PC{0,60}|[./\\\\a-z]{0,30}\\.json",
        ) {
            let is_name = |text: &str| {
                let mut parts = std::path::Path::new(text).components();
                let first = matches!(parts.next(), Some(std::path::Component::Normal(_)));
                first && parts.next().is_none() && !text.contains(['/', '\\', '\0'])
            };
            let mut headers = HeaderMap::new();
            for (key, value) in [("etag", &etag), ("content-range", &range)] {
                if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
                    headers.insert(key, value);
                }
            }
            let of = Commit::parse(COMMIT).unwrap();
            if let Ok(found) = Described::parse(&headers, &of) {
                prop_assert!(is_name(&found.etag.blob()));
            }
            let _ = content_range(&headers);
            let siblings = [serde_json::json!({ "rfilename": name })];
            let body = serde_json::json!({ "sha": commit, "siblings": siblings }).to_string();
            if let Ok(listing) = Listing::parse(body.as_bytes()) {
                prop_assert!(is_name(listing.commit.as_str()));
                prop_assert!(listing.files.iter().all(|file| is_name(file.as_str())));
            }
        }

        #[test]
        fn no_bytes_make_a_listing_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Listing::parse(&body);
        }
    }
}
