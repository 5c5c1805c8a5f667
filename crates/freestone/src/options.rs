//! Options of a device on the command line: `path=disk.img,ro,queues=4`.

/// Options that are being taken apart: each is taken once by name, and what is left over is an error.
#[derive(Debug)]
pub(crate) struct Options {
    /// Key, value and whether it was taken; a key without `=` has no value.
    parts: Vec<(String, Option<String>)>,
}

impl Options {
    /// Splits `text` at commas; two commas in a row stand for one that belongs to a value. With `first`, a first part without
    /// `=` is the value of that key.
    pub(crate) fn parse(text: &str, first: Option<&str>) -> Result<Self, String> {
        Self::parse_repeated(text, first, &[])
    }

    /// The same, where the keys `repeated` may be given more than once.
    pub(crate) fn parse_repeated(text: &str, first: Option<&str>, repeated: &[&str]) -> Result<Self, String> {
        let mut options = Self { parts: Vec::new() };
        for (number, part) in split(text).into_iter().enumerate() {
            let (key, value) = match (part.split_once('='), first) {
                (Some((key, value)), _) => (key.to_owned(), Some(value.to_owned())),
                (None, Some(first)) if number == 0 => (first.to_owned(), Some(part)),
                (None, _) => (part, None),
            };
            if key.is_empty() {
                return Err(format!("{text:?} has an empty option"));
            }
            let again = options.parts.iter().any(|(other, _)| *other == key);
            if again && !repeated.contains(&key.as_str()) {
                return Err(format!("{key:?} is given twice"));
            }
            options.parts.push((key, value));
        }
        Ok(options)
    }

    /// Takes the text of `key`.
    pub(crate) fn text(&mut self, key: &str) -> Result<Option<String>, String> {
        let Some(at) = self.parts.iter().position(|(other, _)| other == key) else { return Ok(None) };
        match self.parts.remove(at) {
            (_, Some(value)) if !value.is_empty() => Ok(Some(value)),
            _ => Err(format!("{key:?} needs a value: {key}=...")),
        }
    }

    /// Takes every value of `keys` in the order in which they were given, read by `parse` which is told the key.
    pub(crate) fn each<T>(
        &mut self,
        keys: &[&str],
        mut parse: impl FnMut(&str, &str) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        let mut values = Vec::new();
        while let Some((key, _)) = self.parts.iter().find(|(key, _)| keys.contains(&key.as_str())) {
            let key = key.clone();
            values.extend(self.with(&key, |text| parse(&key, text))?);
        }
        Ok(values)
    }

    /// Whether `key` is there and was not taken.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.parts.iter().any(|(other, _)| other == key)
    }

    /// Takes the value of `key`, read by `parse`.
    pub(crate) fn with<T>(
        &mut self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, String> {
        let text = self.text(key)?;
        text.map(|text| parse(&text).map_err(|error| format!("{key}={text}: {error}"))).transpose()
    }

    /// Takes a switch: `key`, `key=on` or `key=off`.
    pub(crate) fn switch(&mut self, key: &str) -> Result<Option<bool>, String> {
        let Some(at) = self.parts.iter().position(|(other, _)| other == key) else { return Ok(None) };
        match self.parts.remove(at).1.as_deref() {
            None | Some("on") => Ok(Some(true)),
            Some("off") => Ok(Some(false)),
            Some(other) => Err(format!("{key}={other}: say on or off")),
        }
    }

    /// An option that was not taken.
    pub(crate) fn left(&self) -> Option<&str> {
        self.parts.first().map(|(key, _)| key.as_str())
    }

    /// Fails if an option was not taken. `known` names those there are.
    pub(crate) fn finish(self, known: &str) -> Result<(), String> {
        match self.left() {
            None => Ok(()),
            Some(key) => Err(format!("{key:?} is no option here; there are: {known}")),
        }
    }
}

/// Changes values: `change` is told the number of an option, its key, and its value, or the whole of what has no key.
pub(crate) fn map(text: &str, change: impl Fn(usize, Option<&str>, &str) -> Option<String>) -> String {
    let changed = |(number, part): (usize, String)| {
        let (key, value) = part.split_once('=').map_or((None, part.as_str()), |(k, v)| (Some(k), v));
        let value = change(number, key, value).unwrap_or_else(|| value.to_owned()).replace(',', ",,");
        key.map_or_else(|| value.clone(), |key| format!("{key}={value}"))
    };
    split(text).into_iter().enumerate().map(changed).collect::<Vec<_>>().join(",")
}

/// All options but those that `drop` names, and without the value of the first key, if it was given without the key.
pub(crate) fn without(text: &str, drop: &[&str], first: bool) -> String {
    let parts = split(text).into_iter().enumerate().filter(|(number, part)| {
        let key = part.split_once('=').map_or(part.as_str(), |(key, _)| key);
        if *number == 0 && !part.contains('=') { first } else { !drop.contains(&key) }
    });
    parts.map(|(_, part)| part.replace(',', ",,")).collect::<Vec<_>>().join(",")
}

/// Splits at single commas.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(c);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> Result<u16, String> {
        text.parse().map_err(|_| "not a number".to_owned())
    }

    #[test]
    fn the_first_part_may_do_without_its_key() {
        let mut options = Options::parse("a.img,ro,queues=4", Some("path")).unwrap();
        assert_eq!(options.text("path").unwrap().as_deref(), Some("a.img"));
        assert_eq!(options.switch("ro"), Ok(Some(true)));
        assert_eq!(options.with("queues", number), Ok(Some(4)));
        assert_eq!(options.with("absent", number), Ok(None));
        options.finish("").unwrap();
    }

    #[test]
    fn two_commas_are_one_that_belongs_to_the_value() {
        let mut options = Options::parse("path=a,,b.img,ro=off", None).unwrap();
        assert_eq!(options.text("path").unwrap().as_deref(), Some("a,b.img"));
        assert_eq!(options.switch("ro"), Ok(Some(false)));
    }

    #[test]
    fn keys_that_may_be_repeated_keep_their_order() {
        let mut options = Options::parse_repeated("a=1,b=2,c=9,a=3", None, &["a", "b"]).unwrap();
        let both = options.each(&["a", "b"], |key, text| Ok(format!("{key}{text}"))).unwrap();
        assert_eq!(both, ["a1", "b2", "a3"]);
        assert!(options.has("c") && !options.has("a"));
        assert!(
            Options::parse_repeated("c=1,c=2", None, &["a"]).unwrap_err().contains("\"c\" is given twice")
        );
        let mut options = Options::parse_repeated("a=1,a=x", None, &["a"]).unwrap();
        assert!(options.each(&["a"], |_, text| number(text)).unwrap_err().contains("a=x: not a number"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(Options::parse("a=1,a=2", None).unwrap_err().contains("\"a\" is given twice"));
        assert!(Options::parse("a=1,,,", None).is_err());
        let mut options = Options::parse("queues=x,ro=maybe,path=,rest", None).unwrap();
        assert!(options.with("queues", number).unwrap_err().contains("queues=x"));
        assert!(options.switch("ro").unwrap_err().contains("on or off"));
        assert!(options.text("path").unwrap_err().contains("needs a value"));
        assert!(options.finish("a, b").unwrap_err().contains("\"rest\" is no option here; there are: a, b"));
    }
}
