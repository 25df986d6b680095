//! The elements of a JSON list, read one at a time, so that the list is never held as a whole.

use super::{
    Error, Place,
    stream::{Stream, text},
};
use crate::limits::LINE;

/// The elements of the list in a stream, each as JSON.
pub(super) struct Elements {
    stream: Stream,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the list.
    Before,
    /// In the list.
    Inside,
    /// After the list.
    After,
}

impl Elements {
    /// The elements of a stream that begins with a list.
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, state: State::Before }
    }

    fn find(&mut self) -> Result<Option<(Place, String)>, Error> {
        let (mut element, mut place) = (Vec::new(), self.stream.place());
        let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
        while let Some(byte) = self.stream.byte()? {
            match self.state {
                State::Before => {
                    if byte == b'[' {
                        self.state = State::Inside;
                    }
                    continue;
                }
                State::After if byte.is_ascii_whitespace() => continue,
                State::After => return Err(self.wrong("text follows the end of the list")),
                State::Inside => {}
            }
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = quoted,
                b'"' => quoted = !quoted,
                _ if quoted => {}
                b',' if depth == 0 => return Ok(Some((place.clone(), text(element, place)?))),
                b']' if depth == 0 => {
                    self.state = State::After;
                    if element.is_empty() {
                        continue;
                    }
                    return Ok(Some((place.clone(), text(element, place)?)));
                }
                b'[' | b'{' => depth += 1,
                b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if element.is_empty() {
                if byte.is_ascii_whitespace() {
                    continue;
                }
                place = self.stream.place();
            }
            element.push(byte);
            if element.len() > LINE {
                return Err(Error::LongLine { place });
            }
        }
        match self.state {
            State::After => Ok(None),
            _ => Err(self.wrong("the list does not end")),
        }
    }

    fn wrong(&self, problem: &str) -> Error {
        Error::NotAnObject { place: self.stream.place(), problem: problem.into() }
    }
}

impl Iterator for Elements {
    type Item = Result<(Place, String), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.find();
        if found.is_err() {
            self.stream.end();
            self.state = State::After;
        }
        found.transpose()
    }
}
