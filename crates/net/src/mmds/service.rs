//! What is answered to a request.

use std::time::Instant;

use serde_json::Value;

use super::http::{Answer, Request, Status, TOKEN, TOKEN_TTL};
use super::store::{MmdsStore, count};
use super::{MAX_TOKEN_TTL, MmdsConfig, MmdsVersion};

/// Where tokens are fetched.
const TOKEN_PATH: &str = "/latest/api/token";

/// Answers a request. The metadata is not changed.
pub(super) fn answer(config: &MmdsConfig, store: &MmdsStore, now: Instant, request: &Request) -> Answer {
    match request.method.as_str() {
        "GET" => get(config, store, now, request),
        "PUT" => put(store, now, request),
        _ => {
            let mut answer = Answer::text(Status::MethodNotAllowed, "Not allowed HTTP method.");
            answer.headers.push(("Allow", "GET, PUT".into()));
            answer
        }
    }
}

fn get(config: &MmdsConfig, store: &MmdsStore, now: Instant, request: &Request) -> Answer {
    let known = request.token.as_deref().map(|token| store.knows_token(now, token));
    let refusal = match known {
        Some(true) => None,
        Some(false) => {
            count(&store.counters().invalid_token);
            Some("MMDS token not valid.".to_owned())
        }
        None => {
            count(&store.counters().no_token);
            Some(format!("No MMDS token provided. Use the `{TOKEN}` header to send the session token."))
        }
    };
    if let Some(refusal) = refusal
        && config.version == MmdsVersion::V2
    {
        return Answer::text(Status::Unauthorized, refusal);
    }
    let json = request.accepts_json && !config.imds_compat;
    store.with(&request.path, |value| match value {
        None => not_found(request),
        Some(value) if json => {
            Answer { status: Status::Ok, json: true, headers: Vec::new(), body: value.to_string() }
        }
        Some(value) => match plain(value) {
            Some(body) => Answer::text(Status::Ok, body),
            None => Answer::text(Status::NotImplemented, "The value has no plain text: accept JSON."),
        },
    })
}

fn not_found(request: &Request) -> Answer {
    let path = if request.path.is_empty() { "/" } else { &request.path };
    Answer::text(Status::NotFound, format!("Resource not found: {path}."))
}

/// A value as IMDS says it: a string as it is, an object as the list of its names, with a slash behind those of objects.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(map) => {
            let name = |(name, value): (&String, &Value)| {
                if value.is_object() { format!("{name}/") } else { name.clone() }
            };
            Some(map.iter().map(name).collect::<Vec<_>>().join("\n"))
        }
        _ => None,
    }
}

fn put(store: &MmdsStore, now: Instant, request: &Request) -> Answer {
    if request.forwarded_for {
        return Answer::text(Status::BadRequest, "Invalid header: X-Forwarded-For is not allowed here.");
    }
    if request.path != TOKEN_PATH {
        return not_found(request);
    }
    let Some((name, value)) = &request.token_ttl else {
        let text = format!("Token time to live not found. Use the `{TOKEN_TTL}` header to say it.");
        return Answer::text(Status::BadRequest, text);
    };
    let digits = value.bytes().all(|c| c.is_ascii_digit());
    let ttl = value.parse().ok().filter(|ttl| digits && (1..=MAX_TOKEN_TTL).contains(ttl));
    let Some(ttl) = ttl else {
        let text = format!("Invalid time to live of a token: it must be from 1 to {MAX_TOKEN_TTL} seconds.");
        return Answer::text(Status::BadRequest, text);
    };
    match store.new_token(now, ttl) {
        Ok(token) => {
            let mut answer = Answer::text(Status::Ok, token);
            answer.headers.push((name, ttl.to_string()));
            answer
        }
        Err(error) => {
            tracing::warn!(%error, "no random bytes for a token");
            Answer::text(Status::InternalError, "No token can be made now.")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    struct World {
        config: MmdsConfig,
        store: MmdsStore,
        now: Instant,
    }

    impl World {
        fn new(version: MmdsVersion) -> Self {
            let store = MmdsStore::default();
            let data =
                json!({"latest": {"meta-data": {"ami-id": "ami-1", "net": {}, "n": 5}}, "a/b": "slash"});
            store.put(data).unwrap();
            Self { config: MmdsConfig::new().version(version), store, now: Instant::now() }
        }

        fn ask(&self, request: &Request) -> (Status, String) {
            let answer = answer(&self.config, &self.store, self.now, request);
            (answer.status, answer.body)
        }

        fn token(&self, ttl: &str) -> (Status, String) {
            let token_ttl = Some((TOKEN_TTL, ttl.to_owned()));
            self.ask(&Request {
                method: "PUT".into(),
                path: TOKEN_PATH.into(),
                token_ttl,
                ..Request::default()
            })
        }
    }

    fn get_of(path: &str) -> Request {
        Request { method: "GET".into(), path: path.into(), ..Request::default() }
    }

    #[test]
    fn plain_text_lists_objects_and_shows_strings() {
        let world = World::new(MmdsVersion::V1);
        for (path, status, body) in [
            ("", Status::Ok, "a/b\nlatest/"),
            ("/latest", Status::Ok, "meta-data/"),
            ("/latest/meta-data", Status::Ok, "ami-id\nn\nnet/"),
            ("/latest/meta-data/ami-id", Status::Ok, "ami-1"),
            ("/latest/meta-data/net", Status::Ok, ""),
            ("/latest/meta-data/n", Status::NotImplemented, "The value has no plain text: accept JSON."),
            ("/a~1b", Status::Ok, "slash"),
            ("/nothing", Status::NotFound, "Resource not found: /nothing."),
            (
                "/latest/meta-data/ami-id/x",
                Status::NotFound,
                "Resource not found: /latest/meta-data/ami-id/x.",
            ),
        ] {
            assert_eq!(world.ask(&get_of(path)), (status, body.to_owned()), "{path}");
        }
    }

    #[test]
    fn json_is_for_those_who_accept_it_unless_compatibility_says_otherwise() {
        let mut world = World::new(MmdsVersion::V1);
        let request = Request { accepts_json: true, ..get_of("/latest/meta-data/ami-id") };
        assert_eq!(world.ask(&request), (Status::Ok, "\"ami-1\"".into()));
        assert_eq!(world.ask(&Request { path: "/latest/meta-data/n".into(), ..request.clone() }).1, "5");
        world.config.imds_compat = true;
        assert_eq!(world.ask(&request), (Status::Ok, "ami-1".into()));
    }

    #[test]
    fn version_2_wants_a_token_that_is_valid() {
        let mut world = World::new(MmdsVersion::V2);
        let mut request = get_of("/latest/meta-data/ami-id");
        assert_eq!(world.ask(&request).0, Status::Unauthorized);
        request.token = Some("0".repeat(32));
        assert_eq!(world.ask(&request).0, Status::Unauthorized);
        let (status, token) = world.token("60");
        assert_eq!(status, Status::Ok);
        request.token = Some(token);
        assert_eq!(world.ask(&request), (Status::Ok, "ami-1".into()));
        world.now += Duration::from_secs(60);
        assert_eq!(world.ask(&request).0, Status::Unauthorized);
        let counts = world.store.counts();
        assert_eq!((counts.no_token, counts.invalid_token), (1, 2));
    }

    #[test]
    fn version_1_answers_whatever_the_token() {
        let world = World::new(MmdsVersion::V1);
        let mut request = get_of("/latest");
        assert_eq!(world.ask(&request).0, Status::Ok);
        request.token = Some("wrong".into());
        assert_eq!(world.ask(&request).0, Status::Ok);
        assert_eq!(world.token("1").0, Status::Ok);
    }

    #[test]
    fn tokens_are_given_only_where_and_as_they_should_be() {
        let world = World::new(MmdsVersion::V2);
        for bad in ["0", "21601", "-1", "+5", "x", "", "5.0", "99999999999"] {
            assert_eq!(world.token(bad).0, Status::BadRequest, "{bad}");
        }
        assert_eq!(world.token("21600").0, Status::Ok);
        let put = Request { method: "PUT".into(), path: TOKEN_PATH.into(), ..Request::default() };
        assert_eq!(world.ask(&put).0, Status::BadRequest, "no time to live");
        assert_eq!(world.ask(&Request { path: "/latest".into(), ..put.clone() }).0, Status::NotFound);
        let token_ttl = Some((TOKEN_TTL, "60".into()));
        let forwarded = Request { forwarded_for: true, token_ttl, ..put };
        assert_eq!(world.ask(&forwarded).0, Status::BadRequest);
    }

    #[test]
    fn other_methods_are_not_allowed() {
        let world = World::new(MmdsVersion::V1);
        for method in ["POST", "DELETE", "PATCH", "HEAD", "OPTIONS"] {
            let request = Request { method: method.into(), ..get_of("/latest") };
            let answer = answer(&world.config, &world.store, world.now, &request);
            assert_eq!(answer.status, Status::MethodNotAllowed);
            assert_eq!(answer.headers, [("Allow", "GET, PUT".to_owned())]);
        }
    }
}
