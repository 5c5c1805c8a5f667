//! Names of machines.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

/// The longest name, in bytes. A path with it still fits into the address of a socket.
const MAX_LEN: usize = 64;

/// A name of a machine: 1 to 64 letters, digits, dots, dashes and underscores; the first is no dot and no dash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name(String);

impl Name {
    /// A name for a machine that was given none. `attempt` makes another of it.
    pub(crate) fn made_up(attempt: u32) -> Self {
        const HOW: [&str; 16] = [
            "calm", "clear", "cool", "deep", "dry", "even", "fair", "fine", "firm", "grey", "hard", "light",
            "pale", "plain", "smooth", "still",
        ];
        const WHAT: [&str; 16] = [
            "agate", "basalt", "chalk", "chert", "flint", "gabbro", "gneiss", "granite", "jasper", "marble",
            "marl", "onyx", "opal", "quartz", "slate", "tuff",
        ];
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| u64::from(now.subsec_nanos()));
        let seed = now ^ (u64::from(std::process::id()) << 16) ^ (u64::from(attempt) << 40);
        // One step of a multiplicative hash is enough to spread them.
        let mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let [.., number, what, how] = mixed.to_le_bytes();
        let word =
            |words: &[&'static str; 16], at: u8| words.get(usize::from(at & 15)).copied().unwrap_or("vm");
        Self(format!("{}-{}-{number}", word(&HOW, how), word(&WHAT, what)))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The name with a number at its end.
    pub(crate) fn numbered(&self, number: u32) -> Result<Self, String> {
        format!("{self}-{number}").parse()
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !(1..=MAX_LEN).contains(&text.len()) || !text.chars().all(allowed) || text.starts_with(['.', '-'])
        {
            return Err(format!(
                "say 1 to {MAX_LEN} letters, digits, dots, dashes and underscores, no dot or dash first"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The one of `known` that `text` may have meant.
pub(crate) fn suggestion<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = |name: &&str| distance(text, name) <= text.len().min(name.len()).div_ceil(2).min(3);
    known.into_iter().filter(near).min_by_key(|name| distance(text, name))
}

/// Letters to put in, take out or change to get from one text to the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (at, a) in from.chars().enumerate() {
        let mut diagonal = at;
        let mut left = at + 1;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (cell, b) in row.iter_mut().skip(1).zip(&to) {
            let changed = diagonal + usize::from(a != *b);
            diagonal = *cell;
            left = changed.min(left + 1).min(*cell + 1);
            *cell = left;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_is_harmless_as_a_name_of_a_folder() {
        for good in ["a", "web-1", "A.b_c", &"x".repeat(64)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", ".x", "-x", "a/b", "a b", "ä", "a\n", &"x".repeat(65)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_that_are_made_up_are_names() {
        for attempt in 0..100 {
            let name = Name::made_up(attempt);
            assert_eq!(name.as_str().parse(), Ok(name.clone()));
        }
    }

    #[test]
    fn a_name_that_is_nearly_right_is_suggested() {
        let known = ["web-1", "web-2", "database"];
        assert_eq!(suggestion("wbe-2", known), Some("web-2"));
        assert_eq!(suggestion("databas", known), Some("database"));
        assert_eq!(suggestion("mail", known), None);
    }

    #[test]
    fn distances_count_letters_put_in_taken_out_and_changed() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
    }
}
