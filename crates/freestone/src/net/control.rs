//! stub
use serde_json::{Value, json};
use crate::control::Request;
#[derive(Debug, Default)]
pub(crate) struct Nics {}
impl Nics {
    pub(crate) fn carry_out(&self, _request: Request) -> Result<Value, String> { Ok(json!({"nics": []})) }
}
