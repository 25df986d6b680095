//! Text with structure that a language model can learn, and that a badly pruned one forgets:
//! agreement across relative clauses, arithmetic on what persons own, things to be remembered over
//! several sentences, counting, and lists to be reversed.

use llm_barber::random::SplitMix64;

const PERSONS: &[(&str, &str)] = &[
    ("Anna", "She"),
    ("Ben", "He"),
    ("Clara", "She"),
    ("David", "He"),
    ("Emma", "She"),
    ("Felix", "He"),
    ("Greta", "She"),
    ("Henry", "He"),
];
const GOODS: &[(&str, &str)] = &[
    ("apple", "apples"),
    ("pear", "pears"),
    ("coin", "coins"),
    ("book", "books"),
    ("shell", "shells"),
    ("stamp", "stamps"),
];
const ANIMALS: &[(&str, &str)] = &[
    ("dog", "dogs"),
    ("cat", "cats"),
    ("horse", "horses"),
    ("fox", "foxes"),
    ("owl", "owls"),
    ("goat", "goats"),
];
const CHASES: &[(&str, &str)] =
    &[("chases", "chase"), ("sees", "see"), ("follows", "follow"), ("fears", "fear")];
const SLEEPS: &[(&str, &str)] =
    &[("sleeps", "sleep"), ("runs", "run"), ("jumps", "jump"), ("waits", "wait")];
const COLOURS: &[&str] = &["red", "blue", "green", "white", "black", "yellow"];
const THINGS: &[&str] = &["key", "ring", "letter", "map", "lamp", "drum"];
const PLACES: &[&str] = &["kitchen", "garden", "attic", "cellar", "tower", "barn", "harbour"];

/// About `length` bytes of text: documents of a few scenes, an empty line between them.
pub(crate) fn text(seed: u64, length: usize) -> String {
    let mut writer = Writer { random: SplitMix64::new(seed), text: String::new() };
    while writer.text.len() < length {
        writer.document();
    }
    writer.text
}

struct Writer {
    random: SplitMix64,
    text: String,
}

impl Writer {
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.random.below(from.len())]
    }

    /// `count` different ones.
    fn pick_some<T: Copy>(&mut self, from: &[T], count: usize) -> Vec<T> {
        let mut rest = from.to_vec();
        (0..count).map(|_| rest.swap_remove(self.random.below(rest.len()))).collect()
    }

    /// A number from `low` to `high`, both included.
    fn number(&mut self, low: usize, high: usize) -> usize {
        low + self.random.below(high - low + 1)
    }

    fn say(&mut self, sentence: &str) {
        if !self.text.is_empty() && !self.text.ends_with('\n') {
            self.text.push(' ');
        }
        self.text.push_str(sentence);
    }

    fn document(&mut self) {
        for _ in 0..self.number(3, 5) {
            match self.random.below(6) {
                0 => self.ownership(),
                1 => self.memory(),
                2 => self.agreement(),
                3 => self.counting(),
                4 => self.sums(),
                _ => self.reversal(),
            }
        }
        self.text.push_str("\n\n");
    }

    /// Who has how many of what, after gifts and finds.
    fn ownership(&mut self) {
        let persons = self.pick_some(PERSONS, 2);
        let ((a, pronoun), (b, _)) = (persons[0], persons[1]);
        let goods = self.pick(GOODS);
        let (has, other) = (self.number(2, 9), self.number(1, 9));
        self.say(&format!("{a} has {} and {b} has {}.", amount(has, goods), amount(other, goods)));
        let found = self.number(1, 5);
        self.say(&format!("{pronoun} finds {found} more."));
        self.say(&format!("Now {a} has {}.", amount(has + found, goods)));
        let gift = self.number(1, (has + found).min(5));
        self.say(&format!("{pronoun} gives {gift} of them to {b}."));
        self.say(&format!(
            "Now {a} has {} and {b} has {}.",
            amount(has + found - gift, goods),
            amount(other + gift, goods)
        ));
    }

    /// Where things are, and later the question.
    fn memory(&mut self) {
        let count = self.number(2, 3);
        let (things, places) = (self.pick_some(THINGS, count), self.pick_some(PLACES, count));
        let colours = self.pick_some(COLOURS, count);
        for i in 0..count {
            self.say(&format!("The {} {} is in the {}.", colours[i], things[i], places[i]));
        }
        let order: Vec<usize> = (0..count).collect();
        for i in self.pick_some(&order, 2) {
            self.say(&format!("Where is the {} {}?", colours[i], things[i]));
            self.say(&format!("It is in the {}.", places[i]));
        }
    }

    /// A verb that agrees with its subject across a relative clause.
    fn agreement(&mut self) {
        let animals = self.pick_some(ANIMALS, 3);
        let plural = [0, 1, 2].map(|_| self.random.below(2) == 1);
        let noun = |i: usize| form(animals[i], plural[i]);
        let (chases, follows) = (self.pick(CHASES), self.pick(CHASES));
        let sleeps = self.pick(SLEEPS);
        self.say(&format!(
            "The {} that {} the {} {}.",
            noun(0),
            form(chases, plural[0]),
            noun(1),
            form(sleeps, plural[0])
        ));
        self.say(&format!(
            "The {} that the {} {} also {}.",
            noun(1),
            noun(2),
            form(follows, plural[2]),
            form(sleeps, plural[1])
        ));
    }

    fn counting(&mut self) {
        let (person, _) = self.pick(PERSONS);
        let start = self.number(1, 12);
        let end = start + self.number(3, 6);
        let numbers: Vec<String> = (start..=end).map(|n| n.to_string()).collect();
        self.say(&format!("{person} counts from {start} to {end} : {}.", numbers.join(" ")));
    }

    fn sums(&mut self) {
        for _ in 0..2 {
            let (a, b) = (self.number(1, 9), self.number(1, 9));
            if self.random.below(2) == 0 {
                self.say(&format!("{a} plus {b} is {}.", a + b));
            } else {
                self.say(&format!("{} minus {b} is {a}.", a + b));
            }
        }
    }

    fn reversal(&mut self) {
        let (person, pronoun) = self.pick(PERSONS);
        let count = self.number(3, 4);
        let mut colours = self.pick_some(COLOURS, count);
        self.say(&format!("{person} says {}.", colours.join(" ")));
        colours.reverse();
        self.say(&format!("{pronoun} says it backwards : {}.", colours.join(" ")));
    }
}

fn form((singular, plural): (&'static str, &'static str), is_plural: bool) -> &'static str {
    if is_plural { plural } else { singular }
}

fn amount(count: usize, goods: (&'static str, &'static str)) -> String {
    format!("{count} {}", form(goods, count != 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentences(text: &str) -> Vec<Vec<&str>> {
        text.split_inclusive(['.', '?'])
            .map(|s| s.trim().trim_end_matches(['.', '?']).split_whitespace().collect())
            .collect()
    }

    #[test]
    fn a_seed_means_one_text() {
        assert_eq!(text(1, 5000), text(1, 5000));
        assert_ne!(text(1, 5000), text(2, 5000));
    }

    #[test]
    fn arithmetic_is_right_and_verbs_agree() {
        let text = text(3, 200_000);
        let (mut sums, mut verbs) = (0, 0);
        for words in sentences(&text) {
            match words[..] {
                [a, "plus", b, "is", c] => {
                    let [a, b, c] = [a, b, c].map(|n| n.parse::<usize>().unwrap());
                    assert_eq!(a + b, c);
                    sums += 1;
                }
                ["The", subject, "that", verb, "the", _, last] => {
                    let plural = subject.ends_with('s');
                    assert_eq!(!verb.ends_with('s'), plural, "{words:?}");
                    assert_eq!(!last.ends_with('s'), plural, "{words:?}");
                    verbs += 1;
                }
                _ => {}
            }
        }
        assert!(sums > 100 && verbs > 100);
    }

    #[test]
    fn questions_have_the_answer_that_was_given() {
        let text = text(4, 100_000);
        let mut asked = 0;
        for document in text.split("\n\n") {
            let sentences = sentences(document);
            for (i, question) in sentences.iter().enumerate() {
                let ["Where", "is", "the", colour, thing] = question[..] else { continue };
                let place = sentences[i + 1][4];
                let told = ["The", colour, thing, "is", "in", "the", place];
                assert!(sentences[..i].iter().any(|s| s[..] == told), "{told:?}");
                asked += 1;
            }
        }
        assert!(asked > 100);
    }
}
