//! The zero-shot tasks: turns records of each data set into questions, word for word like lm-eval
//! (EleutherAI's harness).

use std::path::Path;

use serde_json::Value;

use crate::{
    limits::TEXT,
    records::{Error, Record, records},
};

/// A zero-shot task.
pub struct Task {
    /// The task's name in lm-eval and in recipes.
    pub name: &'static str,
    read: fn(&Record) -> Result<Question, Error>,
}

/// Every task, by name.
pub static TASKS: &[Task] = &[
    Task { name: "arc_challenge", read: arc },
    Task { name: "arc_easy", read: arc },
    Task { name: "boolq", read: boolq },
    Task { name: "hellaswag", read: hellaswag },
    Task { name: "openbookqa", read: openbookqa },
    Task { name: "piqa", read: piqa },
    Task { name: "rte", read: rte },
    Task { name: "winogrande", read: winogrande },
];

/// A multiple-choice question. The model's answer is the request with the highest likelihood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The context and the continuation of each choice; the likelihood is that of the continuation.
    pub requests: Vec<(String, String)>,
    /// The lengths of the choices in characters, by which acc_norm divides; `None` for tasks
    /// without acc_norm in lm-eval.
    pub lengths: Option<Vec<usize>>,
    /// Index of the right choice.
    pub gold: usize,
}

impl Task {
    /// The task of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        TASKS.iter().find(|task| task.name == name)
    }

    /// The first `limit` questions of a file of records, in the data set's usual layout.
    ///
    /// # Errors
    /// If a record lacks fields that the task needs, or the questions together are too long.
    pub fn questions(&self, path: &Path, limit: Option<usize>) -> Result<Vec<Question>, Error> {
        let (mut questions, mut length) = (Vec::new(), 0);
        for record in records(path, None)?.take(limit.unwrap_or(usize::MAX)) {
            let question = (self.read)(&record?)?;
            length += question.len();
            if length > TEXT {
                return Err(Error::LongText { path: path.to_owned() });
            }
            questions.push(question);
        }
        Ok(questions)
    }
}

impl Question {
    /// Bytes of all requests.
    fn len(&self) -> usize {
        self.requests.iter().map(|(context, choice)| context.len() + choice.len()).sum()
    }

    /// A question with one context and several choices.
    fn choose(context: &str, choices: &[impl AsRef<str>], gold: usize) -> Self {
        let choices = choices.iter().map(AsRef::as_ref);
        Self {
            requests: choices
                .clone()
                .map(|choice| (context.into(), format!(" {choice}")))
                .collect(),
            lengths: Some(choices.map(|choice| choice.chars().count()).collect()),
            gold,
        }
    }

    /// The question without lengths, for tasks without acc_norm.
    fn without_norm(self) -> Self {
        Self { lengths: None, ..self }
    }
}

/// The index of the right choice of `count`, from a field that counts from `first`.
fn number(record: &Record, name: &str, first: usize, count: usize) -> Result<usize, Error> {
    let value = record.field(name)?;
    let found = match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.trim().parse().ok(),
        Value::Bool(yes) => Some(u64::from(*yes)),
        _ => None,
    };
    found
        .and_then(|number| usize::try_from(number).ok()?.checked_sub(first))
        .filter(|index| *index < count)
        .ok_or_else(|| record.mistyped(name, "the number of a choice", value))
}

/// The choices, and the index of the one whose label is `answerKey`.
fn labelled(record: &Record) -> Result<(Vec<&str>, usize), Error> {
    let choices = record.texts("choices.text")?;
    let key = record.text("answerKey")?.trim();
    let gold = record.texts("choices.label")?.iter().position(|label| *label == key);
    // Some files label choices by numbers and the answer by a letter, or the other way round.
    let place = |key: &str| match key.as_bytes() {
        [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
        [digit @ b'1'..=b'9'] => Some(usize::from(digit - b'1')),
        _ => None,
    };
    let gold = gold.or_else(|| place(key)).filter(|place| *place < choices.len());
    let wrong = || record.mistyped("answerKey", "one of choices.label", &key.into());
    Ok((choices, gold.ok_or_else(wrong)?))
}

fn arc(record: &Record) -> Result<Question, Error> {
    let (choices, gold) = labelled(record)?;
    let context = format!("Question: {}\nAnswer:", record.text("question")?);
    Ok(Question::choose(&context, &choices, gold))
}

fn openbookqa(record: &Record) -> Result<Question, Error> {
    let (choices, gold) = labelled(record)?;
    Ok(Question::choose(record.text("question_stem")?, &choices, gold))
}

fn boolq(record: &Record) -> Result<Question, Error> {
    // The data set's own files have `answer`, true or false; SuperGLUE's have `label`.
    let label = if record.fields.contains_key("label") { "label" } else { "answer" };
    let gold = number(record, label, 0, 2)?;
    let (passage, question) = (record.text("passage")?, record.text("question")?);
    let context = format!("{passage}\nQuestion: {question}?\nAnswer:");
    Ok(Question::choose(&context, &["no", "yes"], gold).without_norm())
}

fn rte(record: &Record) -> Result<Question, Error> {
    let (premise, hypothesis) = (record.text("sentence1")?, record.text("sentence2")?);
    let context = format!("{premise}\nQuestion: {hypothesis} True or False?\nAnswer:");
    let gold = number(record, "label", 0, 2)?;
    Ok(Question::choose(&context, &["True", "False"], gold).without_norm())
}

fn piqa(record: &Record) -> Result<Question, Error> {
    let context = format!("Question: {}\nAnswer:", record.text("goal")?);
    let choices = [record.text("sol1")?, record.text("sol2")?];
    Ok(Question::choose(&context, &choices, number(record, "label", 0, 2)?))
}

fn hellaswag(record: &Record) -> Result<Question, Error> {
    let field = |name| record.text(name);
    let context = format!(
        "{}: {} {}",
        field("activity_label")?,
        field("ctx_a")?,
        capitalised(field("ctx_b")?)
    );
    let endings = record.texts("endings")?;
    let choices: Vec<String> = endings.into_iter().map(without_brackets).collect();
    let gold = number(record, "label", 0, choices.len())?;
    Ok(Question::choose(&without_brackets(&context), &choices, gold))
}

/// The text with its first letter in upper case and the others in lower case.
fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(letters.flat_map(char::to_lowercase)).collect()
}

/// The text without parts in brackets, which are artefacts in WikiHow's part of HellaSwag.
fn without_brackets(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let (mut rest, mut kept) = (text.as_str(), String::new());
    while let Some(open) = rest.find('[') {
        let line = rest[open..].find('\n').map_or(rest.len(), |end| open + end);
        let Some(close) = rest[open..line].find(']') else {
            kept.push_str(&rest[..=open]);
            rest = &rest[open + 1..];
            continue;
        };
        kept.push_str(&rest[..open]);
        rest = &rest[open + close + 1..];
    }
    (kept + rest).replace("  ", " ")
}

/// Both choices have the same continuation: the rest of the sentence after the option.
fn winogrande(record: &Record) -> Result<Question, Error> {
    let sentence = record.text("sentence")?;
    let wrong = || record.mistyped("sentence", "a sentence with a `_`", &sentence.into());
    let (before, after) = sentence.split_once('_').ok_or_else(wrong)?;
    let continuation = format!(" {}", after.trim());
    let options = [record.text("option1")?, record.text("option2")?];
    Ok(Question {
        requests: options.map(|option| (format!("{before}{option}"), continuation.clone())).into(),
        lengths: None,
        gold: number(record, "answer", 1, 2)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_those_of_lm_eval() {
        let recorded = std::fs::read("tests/fixtures/task-requests.json").unwrap();
        let recorded: Value = serde_json::from_slice(&recorded).unwrap();
        assert_eq!(recorded.as_object().unwrap().len(), TASKS.len());
        for task in TASKS {
            let path = format!("tests/fixtures/tasks/{}.jsonl", task.name);
            let found = task.questions(Path::new(&path), None).unwrap();
            let recorded = recorded[task.name].as_array().unwrap();
            assert_eq!(found.len(), recorded.len());
            for (found, recorded) in found.iter().zip(recorded) {
                let requests: Vec<(String, String)> =
                    serde_json::from_value(recorded["requests"].clone()).unwrap();
                assert_eq!(found.requests, requests, "{}", task.name);
                assert_eq!(recorded["gold"], found.gold, "{}", task.name);
                let normed = !["boolq", "rte", "winogrande"].contains(&task.name);
                let lengths = found.lengths.as_ref().map(Vec::len);
                assert_eq!(lengths, normed.then_some(requests.len()), "{}", task.name);
            }
            assert_eq!(task.questions(Path::new(&path), Some(1)).unwrap().len(), 1);
        }
    }

    #[test]
    fn a_letter_may_answer_among_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let line = |key: &str| {
            let choices = r#"{"text": ["x", "y"], "label": ["1", "2"]}"#;
            format!(r#"{{"question": "q", "choices": {choices}, "answerKey": "{key}"}}"#)
        };
        let gold = |key: &str| {
            std::fs::write(&path, line(key)).unwrap();
            let questions = Task::named("arc_easy").unwrap().questions(&path, None);
            questions.map(|questions| questions[0].gold)
        };
        assert_eq!((gold("2").unwrap(), gold("B").unwrap(), gold("A").unwrap()), (1, 1, 0));
        let line = r#"{"question": "q", "choices": {"text": ["x"], "label": ["A", "B"]}, "answerKey": "B"}"#;
        std::fs::write(dir.path().join("b.jsonl"), line).unwrap();
        let beyond = Task::named("arc_easy").unwrap().questions(&dir.path().join("b.jsonl"), None);
        assert!(beyond.unwrap_err().to_string().contains("`answerKey` must be"));
        assert!(gold("C").unwrap_err().to_string().contains("one of choices.label"));
    }

    #[test]
    fn a_missing_field_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        let fine = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}"#;
        for (line, expected) in [
            (r#"{"goal": "g", "sol1": "a", "label": 1}"#, "line 2: no field `sol2`"),
            (r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}"#, "`label` must be"),
            (r#"{"goal": "g", "sol1": "a", "sol2": 3, "label": 1}"#, "`sol2` must be a string"),
        ] {
            std::fs::write(&path, format!("{fine}\n{line}\n")).unwrap();
            let task = Task::named("piqa").unwrap();
            let error = task.questions(&path, None).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("line 2"), "{error}");
        }
    }
}
