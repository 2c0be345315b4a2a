//! The text of one sequence as it grows: detokenized, cut at stop strings, handed out only when it
//! can no longer change.
//!
//! ```text
//! text      [ handed out | held back ]
//! held back the longest end of the text that a stop string begins with
//! ```
//! (Bytes of an unfinished character are held back below, in [`Detokenizer`].)

use super::tokenizer::{Detokenizer, Tokenizer};
use crate::error::Result;

/// Text so far, and how much of it was handed out.
#[derive(Clone, Debug, Default)]
pub(super) struct TextStream {
    detokenizer: Detokenizer,
    text: String,
    handed_out: usize,
}

/// What a token did to the text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Progress {
    /// Text that is now certain.
    pub new: String,
    /// Whether a stop string has appeared; the text then ends before it.
    pub stopped: bool,
}

impl TextStream {
    /// Appends a token.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32, stops: &[String]) -> Result<Progress> {
        let piece = self.detokenizer.push(tokenizer, id)?;
        Ok(self.append(&piece, stops, false))
    }

    /// Ends the text: everything held back is handed out, unless a stop string appears in it.
    pub fn finish(&mut self, tokenizer: &Tokenizer, stops: &[String]) -> Result<Progress> {
        let piece = self.detokenizer.finish(tokenizer)?;
        Ok(self.append(&piece, stops, true))
    }

    fn append(&mut self, piece: &str, stops: &[String], last: bool) -> Progress {
        self.text.push_str(piece);
        // What was handed out holds no part of a stop string.
        let found = stops.iter().filter_map(|stop| self.text[self.handed_out..].find(stop.as_str())).min();
        let end = match found {
            Some(at) => {
                self.text.truncate(self.handed_out + at);
                self.text.len()
            }
            None if last => self.text.len(),
            None => self.text.len() - held_back(&self.text[self.handed_out..], stops),
        };
        let new = self.text[self.handed_out..end].to_owned();
        self.handed_out = end;
        Progress { new, stopped: found.is_some() }
    }
}

/// Bytes at the end of `text` that a stop string begins with.
fn held_back(text: &str, stops: &[String]) -> usize {
    let longest = |stop: &String| {
        let candidates = (1..stop.len().min(text.len() + 1)).rev();
        candidates.into_iter().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n])).unwrap_or(0)
    };
    stops.iter().map(longest).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(pieces: &[&str], stops: &[&str]) -> (Vec<String>, String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut stream = TextStream::default();
        let mut out = Vec::new();
        for (i, piece) in pieces.iter().enumerate() {
            let progress = stream.append(piece, &stops, i + 1 == pieces.len());
            out.push(progress.new);
            if progress.stopped {
                return (out, stream.text, true);
            }
        }
        (out, stream.text, false)
    }

    #[test]
    fn stop_strings_across_pieces_are_cut_and_never_handed_out() {
        let (out, text, stopped) = feed(&["one EN", "D two"], &["END"]);
        assert_eq!((out.concat(), text.as_str(), stopped), ("one ".to_owned(), "one ", true));
        assert_eq!(out[0], "one ");
    }

    #[test]
    fn what_looked_like_a_stop_is_handed_out_later() {
        let (out, text, stopped) = feed(&["a E", "N", "d", "é<", ""], &["END", "<é"]);
        assert_eq!(out, ["a ", "", "ENd", "é", "<"]);
        assert_eq!((text.as_str(), stopped), ("a ENdé<", false));
    }

    #[test]
    fn the_earliest_of_several_stops_wins() {
        let (_, text, stopped) = feed(&["x b a", ""], &["a", "b"]);
        assert_eq!((text.as_str(), stopped), ("x ", true));
    }

    #[test]
    fn without_stops_nothing_is_held_back() {
        let (out, ..) = feed(&["a", "b\n", ""], &[]);
        assert_eq!(out, ["a", "b\n", ""]);
    }
}
