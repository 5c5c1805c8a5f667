//! [`MmdsStore`]: the metadata, the tokens that were given out, and counters.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::MAX_TOKENS;
use crate::{Error, Result};

/// Most bytes of metadata, as JSON without spaces, if nothing else is said.
pub const DEFAULT_LIMIT: usize = 51200;

/// Metadata of a machine, as a JSON document. Clones are the same.
///
/// ```
/// use freestone_net::mmds::MmdsStore;
/// use serde_json::json;
///
/// # fn main() -> freestone_net::Result<()> {
/// let store = MmdsStore::default();
/// store.put(json!({"latest": {"meta-data": {"ami-id": "ami-1", "gone": "x"}}}))?;
/// store.patch(&json!({"latest": {"meta-data": {"ami-id": "ami-2", "gone": null}}}))?;
/// assert_eq!(store.get(), json!({"latest": {"meta-data": {"ami-id": "ami-2"}}}));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct MmdsStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: usize,
    data: Mutex<Option<Value>>,
    tokens: Mutex<Vec<Token>>,
    counters: Counters,
}

/// A token: 128 random bits.
#[derive(Debug)]
struct Token {
    secret: [u8; 16],
    expires: Instant,
}

impl Default for MmdsStore {
    fn default() -> Self {
        Self::new(DEFAULT_LIMIT)
    }
}

impl MmdsStore {
    /// An empty store for at most `limit` bytes of JSON, counted without spaces.
    pub fn new(limit: usize) -> Self {
        let (data, tokens, counters) = Default::default();
        Self(Arc::new(Inner { limit, data, tokens, counters }))
    }

    /// Most bytes.
    pub fn limit(&self) -> usize {
        self.0.limit
    }

    /// Replaces all metadata.
    ///
    /// # Errors
    /// [`Error::MetadataTooLarge`]; [`Error::Invalid`] if it is not an object. The metadata stays as it is.
    pub fn put(&self, value: Value) -> Result<()> {
        if !value.is_object() {
            let short: String = value.to_string().chars().take(32).collect();
            return Err(Error::invalid("metadata", short, "it must be a JSON object"));
        }
        self.check(&value)?;
        *lock(&self.0.data) = Some(value);
        Ok(())
    }

    /// Changes the metadata by a merge patch (RFC 7396): objects are merged, `null` removes, all else replaces.
    ///
    /// # Errors
    /// [`Error::NoMetadata`] before the first [`put`](Self::put); [`Error::MetadataTooLarge`] and [`Error::Invalid`] if what comes
    /// out is. The metadata stays as it is.
    pub fn patch(&self, patch: &Value) -> Result<()> {
        let mut data = lock(&self.0.data);
        let old = data.as_ref().ok_or(Error::NoMetadata)?;
        if !patch.is_object() {
            return Err(Error::invalid("patch of metadata", patch.to_string(), "it must be a JSON object"));
        }
        let mut new = old.clone();
        merge(&mut new, patch);
        self.check(&new)?;
        *data = Some(new);
        Ok(())
    }

    /// All metadata; an empty object before the first [`put`](Self::put).
    pub fn get(&self) -> Value {
        lock(&self.0.data).clone().unwrap_or_else(|| Value::Object(Map::new()))
    }

    /// Whether there was a [`put`](Self::put).
    pub fn is_initialized(&self) -> bool {
        lock(&self.0.data).is_some()
    }

    /// What was asked of the service by all cards that have this store.
    pub fn counts(&self) -> MmdsCounts {
        self.0.counters.counts()
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.0.counters
    }

    /// Gives the value at a JSON pointer to `then`.
    pub(super) fn with<T>(&self, pointer: &str, then: impl FnOnce(Option<&Value>) -> T) -> T {
        then(lock(&self.0.data).as_ref().and_then(|data| data.pointer(pointer)))
    }

    /// A new token in hexadecimal digits that is valid for so many seconds from `now` on.
    pub(super) fn new_token(&self, now: Instant, ttl: u32) -> io::Result<String> {
        let mut secret = [0; 16];
        let filled = rustix::rand::getrandom(&mut secret, rustix::rand::GetRandomFlags::empty())?;
        if filled != secret.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let expires = now.checked_add(Duration::from_secs(ttl.into())).unwrap_or(now);
        let mut tokens = lock(&self.0.tokens);
        tokens.retain(|token| token.expires > now);
        if tokens.len() >= MAX_TOKENS {
            let first = tokens.iter().enumerate().min_by_key(|(_, token)| token.expires);
            if let Some((index, _)) = first {
                tokens.swap_remove(index);
            }
        }
        tokens.push(Token { secret, expires });
        Ok(format!("{:032x}", u128::from_be_bytes(secret)))
    }

    /// Whether this is a token that is valid now.
    pub(super) fn knows_token(&self, now: Instant, token: &str) -> bool {
        if token.len() != 32 || !token.bytes().all(|c| c.is_ascii_hexdigit()) {
            return false;
        }
        let Ok(secret) = u128::from_str_radix(token, 16) else { return false };
        let secret = secret.to_be_bytes();
        // All bytes of all tokens are looked at, so that the time says nothing.
        let same =
            |token: &Token| token.secret.iter().zip(secret).fold(0, |diff, (a, b)| diff | (a ^ b)) == 0;
        lock(&self.0.tokens).iter().fold(false, |known, token| known | (same(token) & (token.expires > now)))
    }

    fn check(&self, value: &Value) -> Result<()> {
        let (size, limit) = (size(value), self.0.limit);
        if size > limit {
            return Err(Error::MetadataTooLarge { size, limit });
        }
        Ok(())
    }
}

/// Bytes of a value as JSON.
fn size(value: &Value) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0 = self.0.saturating_add(data.len());
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    match serde_json::to_writer(&mut count, value) {
        Ok(()) => count.0,
        Err(_) => usize::MAX,
    }
}

/// RFC 7396, section 2. As deep as the patch, which whoever parsed it has bounded.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            target.remove(name);
        } else {
            merge(target.entry(name.as_str()).or_insert(Value::Null), value);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done in it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters, written by workers.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        /// What was asked of the service, at one moment.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        #[non_exhaustive]
        pub struct MmdsCounts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            fn counts(&self) -> MmdsCounts {
                MmdsCounts { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Frames from machines that were for the service.
    rx_frames,
    /// Those of them that made no sense, or came when too many answers waited.
    rx_dropped,
    /// Frames to machines.
    tx_frames,
    /// Their bytes.
    tx_bytes,
    /// Connections that began.
    connections_created,
    /// Connections that ended.
    connections_destroyed,
    /// Requests that were answered.
    requests,
    /// Those of them that were answered with an error.
    errors,
    /// Requests for metadata without a token.
    no_token,
    /// Requests for metadata with a token that is not or no longer valid.
    invalid_token,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patches_are_merged_as_the_rfc_shows() {
        // RFC 7396, appendix A.
        for (target, patch, want) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let store = MmdsStore::default();
            store.put(target).unwrap();
            store.patch(&patch).unwrap();
            assert_eq!(store.get(), want);
        }
    }

    #[test]
    fn what_is_too_large_or_no_object_changes_nothing() {
        let store = MmdsStore::new(20);
        assert!(matches!(store.patch(&json!({"a": 1})), Err(Error::NoMetadata)));
        assert_eq!((store.get(), store.is_initialized()), (json!({}), false));
        // {"a":"0123456789abc"} is 21 bytes.
        let large = json!({"a": "0123456789abc"});
        assert!(matches!(store.put(large.clone()), Err(Error::MetadataTooLarge { size: 21, limit: 20 })));
        store.put(json!({"a": "0123456789ab"})).unwrap();
        assert!(matches!(store.patch(&large), Err(Error::MetadataTooLarge { size: 21, limit: 20 })));
        assert!(store.put(json!([1])).is_err() && store.patch(&json!("x")).is_err());
        assert_eq!(store.get(), json!({"a": "0123456789ab"}));
    }

    #[test]
    fn tokens_expire_and_are_bounded() {
        let (store, now) = (MmdsStore::default(), Instant::now());
        let token = store.new_token(now, 10).unwrap();
        assert!(store.knows_token(now + Duration::from_millis(9999), &token));
        assert!(!store.knows_token(now + Duration::from_secs(10), &token));
        for wrong in
            ["", "0", &token[1..], &format!("{token}0"), &format!("+{}", &token[1..]), &"0".repeat(32)]
        {
            assert!(!store.knows_token(now, wrong), "{wrong}");
        }
        let long = store.new_token(now, 100).unwrap();
        for _ in 0..MAX_TOKENS {
            store.new_token(now, 50).unwrap();
        }
        assert_eq!(lock(&store.0.tokens).len(), MAX_TOKENS);
        assert!(store.knows_token(now, &long) && !store.knows_token(now, &token), "the first to expire goes");
    }
}
