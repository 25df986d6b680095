//! What the ranks of a run do together: none goes on where another one has failed, or does another run.

use std::iter::zip;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Error;
use crate::{journal::Identity, prune, ranks::Ranks, version::Version};

/// What a rank says of its part.
#[derive(Serialize, Deserialize)]
struct Failed {
    problem: String,
    is_usage: bool,
}

/// Does a part of the run on each rank. The result is an error on every rank if it is one on any.
pub(super) fn together<T>(
    ranks: &Ranks,
    part: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let own = part();
    let failed = own.as_ref().err();
    let failed = failed.map(|e| Failed { problem: e.to_string(), is_usage: e.is_usage() });
    let all = ranks.gather_values(failed).into_iter().enumerate();
    let first = all.filter_map(|(rank, failed)| Some((rank, failed?))).next();
    match (own, first) {
        (Ok(_), Some((rank, Failed { problem, is_usage }))) => {
            Err(Error::OfRank { rank, problem, is_usage })
        }
        (own, _) => own,
    }
}

/// Checks that all ranks do the same runs as the first one, with the same instructions.
pub(crate) fn alike(ranks: &Ranks, runs: &[Identity]) -> Result<(), Error> {
    if ranks.size() == 1 {
        return Ok(());
    }
    together(ranks, || {
        let own = (Version::current(), runs);
        let failed = |e: serde_json::Error| Error::Report(e.to_string());
        let text = ranks.of_first(serde_json::to_string(&own).map_err(failed)?);
        let first: (Version, Vec<Identity>) = serde_json::from_str(&text).map_err(failed)?;
        let differ = zip(&first.1, runs).map(|(first, own)| first.unlike(own));
        let mut what = differ.into_iter().find(|what| !what.is_empty()).unwrap_or_default();
        if first.1.len() != runs.len() {
            what.push(format!("it has {} runs, not {}", runs.len(), first.1.len()));
        }
        if first.0 != own.0 {
            what.push(format!("it is {}, not {}", own.0, first.0));
        }
        if what.is_empty() { Ok(()) } else { Err(Error::OtherThanFirst(what)) }
    })
}

/// Checks that some bytes, of what the ranks have decided at a place, are the same on all ranks.
pub(super) fn agreed(
    ranks: &Ranks,
    place: &str,
    parts: impl FnOnce(&mut dyn FnMut(&[u8])),
) -> Result<(), prune::Error> {
    if ranks.size() == 1 {
        return Ok(());
    }
    let mut digest = Sha256::new();
    parts(&mut |part| digest.update(part));
    let all = ranks.gather(&digest.finalize());
    match all.iter().position(|found| *found != all[0]) {
        None => Ok(()),
        Some(rank) => Err(prune::Error::Apart { rank, place: place.to_owned() }),
    }
}
