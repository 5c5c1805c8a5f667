//! The metadata that a guest can read: one JSON object, bounded in size.

use serde_json::Value;

use super::fault::Fault;

/// The data store.
#[derive(Debug)]
pub(crate) struct Store {
    contents: Option<Value>,
    limit: usize,
}

impl Store {
    /// Holds up to `limit` bytes of JSON.
    pub(crate) fn new(limit: usize) -> Self {
        Self { contents: None, limit }
    }

    /// What is held; an empty object before there was anything.
    pub(crate) fn get(&self) -> Value {
        self.contents.clone().unwrap_or_else(|| Value::Object(serde_json::Map::new()))
    }

    /// Replaces everything.
    pub(crate) fn put(&mut self, contents: Value) -> Result<&Value, Fault> {
        if !contents.is_object() {
            return Err(Fault::bad_request("The MMDS data store holds an object, nothing else."));
        }
        self.hold(contents)
    }

    /// Merges (RFC 7396): members replace those of their name, `null` removes.
    pub(crate) fn patch(&mut self, patch: &Value) -> Result<&Value, Fault> {
        let Some(contents) = &self.contents else {
            return Err(Fault::bad_request("The MMDS data store is not initialized."));
        };
        if !patch.is_object() {
            return Err(Fault::bad_request("The MMDS data store holds an object, nothing else."));
        }
        let mut contents = contents.clone();
        merge(&mut contents, patch);
        self.hold(contents)
    }

    fn hold(&mut self, contents: Value) -> Result<&Value, Fault> {
        let size = contents.to_string().len();
        if size > self.limit {
            let limit = self.limit;
            return Err(Fault::too_large(format!(
                "The MMDS data of {size} bytes is larger than the limit of {limit}."
            )));
        }
        Ok(self.contents.insert(contents))
    }
}

/// Depth is bounded: the parser takes no more than 128 levels.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(target) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            target.remove(name);
        } else {
            merge(target.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_patch_replaces_adds_and_removes_members() {
        let mut store = Store::new(1000);
        assert_eq!(store.get(), json!({}));
        store.put(json!({"a": {"b": 1, "c": [1, 2]}, "d": 4})).unwrap();
        let after = store.patch(&json!({"a": {"b": null, "c": 3, "e": {"f": null}}, "g": {}})).unwrap();
        assert_eq!(*after, json!({"a": {"c": 3, "e": {}}, "d": 4, "g": {}}));
    }

    #[test]
    fn a_store_holds_an_object_that_is_not_too_large() {
        let mut store = Store::new(20);
        assert!(store.patch(&json!({})).unwrap_err().message.contains("not initialized"));
        assert!(store.put(json!([1])).is_err());
        store.put(json!({"a": "123456789"})).unwrap();
        let fault = store.patch(&json!({"b": "123456789"})).unwrap_err();
        assert!(fault.message.contains("limit of 20"), "{fault}");
        assert_eq!(store.get(), json!({"a": "123456789"}));
        assert!(store.patch(&json!(7)).is_err());
    }
}
