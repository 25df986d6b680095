//! Log-likelihoods of continuations. The common beginning of a question's requests is computed
//! once: a question is a tree with a root and branches, and several trees fill a matrix.

use std::{collections::BTreeMap, ops::Range};

use super::{
    accuracy::Request,
    head::{Head, head_fraction},
    perplexity::{STATES, hidden},
};
use crate::{
    checkpoint::Pruned,
    executor::{Positions, Tree, ops::Ops},
    model::{Error, Model},
};

/// Number of tokens that run as one matrix.
const TOKENS: usize = 512;

/// Trees that run as one matrix, and the predictions to read from them.
#[derive(Default)]
struct Forest {
    ids: Vec<u32>,
    trees: Vec<Tree>,
    /// For each row that predicts tokens: the tokens, and the indices of their requests.
    wanted: BTreeMap<usize, Vec<(u32, usize)>>,
}

impl Forest {
    /// Adds the requests of a question; the first has the index `first`.
    fn plant(&mut self, requests: &[Request], first: usize) {
        // The last token of a request is only predicted.
        let read = |request: &Request| request.ids.len() - 1;
        let shortest = requests.iter().map(read).min().unwrap_or(0);
        let common =
            |i: &usize| requests.iter().all(|request| request.ids[*i] == requests[0].ids[*i]);
        let root = (0..shortest).take_while(common).count();
        let start = self.ids.len();
        if let Some(request) = requests.first() {
            self.ids.extend_from_slice(&request.ids[..root]);
        }
        let mut branches = Vec::new();
        for (i, request) in requests.iter().enumerate() {
            let branch = self.ids.len();
            self.ids.extend_from_slice(&request.ids[root..read(request)]);
            branches.push(branch..self.ids.len());
            for token in request.ids.len() - request.continuation..request.ids.len() {
                let before = token - 1;
                let row = if before < root { start + before } else { branch + before - root };
                self.wanted.entry(row).or_default().push((request.ids[token], first + i));
            }
        }
        self.trees.push(Tree { root: start..start + root, branches });
    }
}

/// The log-likelihood of each request's continuation, in nats, question by question.
pub(super) fn log_likelihoods<D: Ops>(
    model: &Model<'_, D>,
    pruned: &Pruned,
    questions: &[Vec<Request>],
    mut done_so_far: impl FnMut(f64),
) -> Result<Vec<Vec<f64>>, Error> {
    let mut sums = vec![0.0; questions.iter().map(Vec::len).sum()];
    // Questions of similar length fill matrices evenly; the longest come first.
    let mut order: Vec<(usize, &Vec<Request>)> = Vec::with_capacity(questions.len());
    let mut first = 0;
    for question in questions {
        order.push((first, question));
        first += question.len();
    }
    order
        .sort_by_key(|(_, question)| std::cmp::Reverse(question.iter().map(|r| r.ids.len()).max()));
    let mut forests = vec![Forest::default()];
    for (first, question) in order {
        if forests.last().is_some_and(|forest| forest.ids.len() >= TOKENS) {
            forests.push(Forest::default());
        }
        if let Some(forest) = forests.last_mut() {
            forest.plant(question, first);
        }
    }
    let all: usize = forests.iter().map(|forest| forest.ids.len()).sum();
    let head_fraction = head_fraction(&model.decoder);
    let mut done = 0;
    for batch in batches(&forests, (STATES / model.decoder.hidden_size).max(1)) {
        let batch = &forests[batch];
        let tokens: usize = batch.iter().map(|forest| forest.ids.len()).sum();
        let samples = batch.iter().map(|Forest { ids, trees, .. }| {
            (&ids[..], Positions::of_trees(&model.decoder, ids.len(), trees))
        });
        let stream = model.embed_at(samples, 0)?;
        let mut so_far =
            |of_batch: f64| done_so_far((done as f64 + tokens as f64 * of_batch) / all as f64);
        let states =
            hidden(model, pruned, stream, |layers| so_far((1.0 - head_fraction) * layers))?;
        let head = Head::new(model)?;
        let found = model.executor.of_samples(&states, |i, states| {
            let (forest, mut found) = (&batch[i], Vec::new());
            let rows: Vec<usize> = forest.wanted.keys().copied().collect();
            head.tiles(states, &rows, |rows, logits| {
                let logits = logits.on_host()?;
                for (row, logits) in rows.iter().zip(logits.chunks(model.decoder.vocab_size)) {
                    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f64 = logits.iter().map(|z| f64::from(z - largest).exp()).sum();
                    let wanted = forest.wanted[row].iter().map(|(token, _)| *token as usize);
                    found.extend(wanted.map(|token| f64::from(logits[token] - largest) - sum.ln()));
                }
                Ok(())
            })?;
            so_far(1.0 - head_fraction + head_fraction * (i + 1) as f64 / batch.len() as f64);
            Ok::<_, Error>(found)
        })?;
        for (forest, found) in batch.iter().zip(found) {
            let requests = forest.wanted.values().flatten().map(|(_, request)| *request);
            requests.zip(found).for_each(|(request, found)| sums[request] += found);
        }
        done += tokens;
    }
    let mut sums = sums.into_iter();
    Ok(questions.iter().map(|question| sums.by_ref().take(question.len()).collect()).collect())
}

/// Ranges of forests with at most `most` tokens together.
fn batches(forests: &[Forest], most: usize) -> Vec<Range<usize>> {
    let (mut runs, mut start, mut tokens) = (Vec::new(), 0, 0);
    for (i, forest) in forests.iter().enumerate() {
        if tokens + forest.ids.len() > most && i > start {
            runs.push(start..i);
            (start, tokens) = (i, 0);
        }
        tokens += forest.ids.len();
    }
    runs.push(start..forests.len());
    runs
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use dfdx::tensor::Cpu;

    use super::*;
    use crate::{checkpoint::Reader, evaluate::logits};

    fn request(ids: &[u32], continuation: usize) -> Request {
        Request { ids: ids.to_vec(), continuation }
    }

    #[test]
    fn shared_prefixes_change_nothing() {
        // Learned positions, a window, both kinds of layers, and two position codes or none.
        for name in ["opt", "mistral", "gemma2", "gemma3", "cohere2", "phi3-longrope"] {
            let reader = Reader::open(&Path::new("tests/fixtures/logits").join(name)).unwrap();
            let model = Model::new(&reader, Cpu::default()).unwrap();
            let questions = [
                vec![
                    request(&[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], 2),
                    request(&[5, 6, 7, 8, 9, 10, 11, 12, 20, 21, 22], 3),
                    request(&[5, 6, 7, 8, 9, 10, 11, 12, 13], 1),
                ],
                vec![request(&[30, 31], 1), request(&[40, 41, 42], 1)],
            ];
            let found = log_likelihoods(&model, &Pruned::dense(), &questions, |_| ()).unwrap();
            for (requests, found) in questions.iter().zip(found) {
                for (request, found) in requests.iter().zip(found) {
                    let logits = logits(&model, &Pruned::dense(), &request.ids).unwrap();
                    let rows: Vec<&[f32]> = logits.chunks(model.decoder.vocab_size).collect();
                    let targets = request.ids.len() - request.continuation..request.ids.len();
                    let expected: f64 = targets
                        .map(|i| {
                            let exp = |z: &f32| f64::from(*z).exp();
                            let sum: f64 = rows[i - 1].iter().map(exp).sum();
                            f64::from(rows[i - 1][request.ids[i] as usize]) - sum.ln()
                        })
                        .sum();
                    assert!((found - expected).abs() < 1e-4, "{name}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn batches_hold_what_they_may() {
        let forest = |tokens| Forest { ids: vec![0; tokens], ..Forest::default() };
        let forests = [3, 3, 3, 9, 1].map(forest);
        assert_eq!(batches(&forests, 6), [0..2, 2..3, 3..4, 4..5]);
    }
}
