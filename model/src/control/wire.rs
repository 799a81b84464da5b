//! The lines of the control protocol: JSON-RPC 2.0 (jsonrpc.org/specification, sections 4 and 5).
//!
//! ```text
//!   line --read_call--> Call { id, request }  |  Refusal { id, error }     (the machine's side)
//!   line --read_message--> Message::Answer | Message::Event                (the client's side)
//! ```

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use super::{Event, Request};

/// Why a request was not carried out, as a JSON-RPC error code.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Code {
    /// The line is no JSON.
    Parse,
    /// The line is JSON, and no request.
    BadRequest,
    /// There is no such method.
    UnknownMethod,
    /// The method's parameters are wrong.
    BadParams,
    /// The machine is in a state in which this cannot be done.
    NotNow,
    /// It was tried, and did not work.
    Failed,
    /// The machine does not have what it takes: a display, say.
    Missing,
    /// This connection cannot be served: too many of them, or somebody else's.
    Refused,
}

impl Code {
    /// The number on the wire: -32700 to -32600 are JSON-RPC's own, -32099 to -32000 ours.
    pub const fn number(self) -> i64 {
        match self {
            Self::Parse => -32700,
            Self::BadRequest => -32600,
            Self::UnknownMethod => -32601,
            Self::BadParams => -32602,
            Self::NotNow => -32000,
            Self::Failed => -32001,
            Self::Missing => -32002,
            Self::Refused => -32003,
        }
    }
}

/// An error on the wire.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// A [`Code`]'s number, or one that a newer machine knows.
    pub code: i64,
    /// What is wrong, and what to do.
    pub message: String,
}

impl WireError {
    /// An error with this code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code: code.number(), message: message.into() }
    }
}

/// A request with the id that its answer has.
#[derive(Clone, PartialEq, Debug)]
pub struct Call {
    /// Without it, nobody wants to know the answer.
    pub id: Option<Value>,
    /// What is asked.
    pub request: Request,
}

/// A line that is no [`Call`].
#[derive(Clone, PartialEq, Debug)]
pub struct Refusal {
    /// The answer's id: `null` where the line does not tell. Nothing for a request that wants no answer.
    pub id: Option<Value>,
    /// Why.
    pub error: WireError,
}

#[derive(Deserialize)]
struct Envelope {
    jsonrpc: Option<Value>,
    // `"id": null` is an id, and no id is none.
    #[serde(default, deserialize_with = "present")]
    id: Option<Value>,
    method: Option<Value>,
    params: Option<Value>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// Reads a request's line.
///
/// # Errors
/// What to answer instead.
pub fn read_call(line: &[u8]) -> Result<Call, Refusal> {
    let refuse = |code, message: String| Refusal {
        id: Some(Value::Null),
        error: WireError::new(code, message),
    };
    let value: Value = serde_json::from_slice(line)
        .map_err(|error| refuse(Code::Parse, format!("the line is no JSON: {error}")))?;
    let what = match &value {
        Value::Object(_) => None,
        Value::Array(_) => Some("a request is an object; send a line for each instead of a batch"),
        _ => Some("a request is an object"),
    };
    if let Some(what) = what {
        return Err(refuse(Code::BadRequest, what.into()));
    }
    let envelope = Envelope::deserialize(value)
        .map_err(|error| refuse(Code::BadRequest, format!("the line is no request: {error}")))?;
    let id = match envelope.id {
        Some(Value::Object(_) | Value::Array(_) | Value::Bool(_)) => {
            return Err(refuse(Code::BadRequest, "an id is a number or a text".into()));
        }
        id => id,
    };
    let refuse = |code, message: &str| Refusal {
        id: Some(id.clone().unwrap_or(Value::Null)),
        error: WireError::new(code, message),
    };
    if envelope.jsonrpc != Some("2.0".into()) {
        return Err(refuse(Code::BadRequest, "the line has no \"jsonrpc\": \"2.0\""));
    }
    let Some(Value::String(method)) = envelope.method else {
        return Err(refuse(Code::BadRequest, "\"method\" must be there, and a text"));
    };
    match Request::read(&method, envelope.params) {
        Ok(request) => Ok(Call { id, request }),
        Err(error) => Err(Refusal { id, error }),
    }
}

/// A request's line, with its end.
///
/// # Errors
/// A path is not UTF-8, which JSON cannot hold.
pub fn call_line(id: u64, request: &Request) -> Result<String, serde_json::Error> {
    let mut message = Map::new();
    message.insert("jsonrpc".into(), "2.0".into());
    message.insert("id".into(), id.into());
    message.insert("method".into(), request.method().into());
    if let Some(params) = request.params()? {
        message.insert("params".into(), params);
    }
    Ok(line(&Value::Object(message)))
}

/// An answer's line, with its end.
pub fn answer_line(id: &Value, answer: &Result<Value, WireError>) -> String {
    line(&match answer {
        Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
        Err(error) => json!({"jsonrpc": "2.0", "id": id, "error": error}),
    })
}

/// An event's line, with its end.
pub fn event_line(event: &Event) -> String {
    line(&json!({"jsonrpc": "2.0", "method": "event", "params": event}))
}

fn line(message: &Value) -> String {
    // JSON without white space has no line break in it: they are escaped in texts.
    format!("{message}\n")
}

/// What a machine sends.
#[derive(Clone, PartialEq, Debug)]
pub enum Message {
    /// The answer to the request with this id.
    Answer {
        /// The request's id; `null` where the machine could not read it.
        id: Value,
        /// What became of it.
        result: Result<Value, WireError>,
    },
    /// Something happened. Nothing if it is of a kind that this version does not know.
    Event(Option<Event>),
}

/// Reads a line that a machine sent.
///
/// # Errors
/// It is not of this protocol.
pub fn read_message(line: &[u8]) -> Result<Message, serde_json::Error> {
    #[derive(Deserialize)]
    struct Incoming {
        method: Option<String>,
        params: Option<Value>,
        #[serde(default)]
        id: Value,
        #[serde(default, deserialize_with = "present")]
        result: Option<Value>,
        error: Option<WireError>,
    }
    let incoming: Incoming = serde_json::from_slice(line)?;
    let result = match (incoming.method, incoming.result, incoming.error) {
        (Some(_), ..) => {
            let event = incoming.params.and_then(|params| serde_json::from_value(params).ok());
            return Ok(Message::Event(event));
        }
        (None, _, Some(error)) => Err(error),
        (None, Some(result), None) => Ok(result),
        (None, None, None) => {
            return Err(serde::de::Error::custom("neither an answer nor an event"));
        }
    };
    Ok(Message::Answer { id: incoming.id, result })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Now, Screendump};
    use crate::state::{MachineRequest, MachineState};
    use proptest::prelude::*;

    #[test]
    fn requests_look_like_this() {
        for (request, golden) in [
            (Request::Hello, r#"{"jsonrpc":"2.0","id":1,"method":"hello"}"#),
            (
                Request::Machine(MachineRequest::PowerButton),
                r#"{"jsonrpc":"2.0","id":1,"method":"power-button"}"#,
            ),
            (
                Request::Screendump(Screendump { path: "/tmp/a b\n.png".into() }),
                r#"{"jsonrpc":"2.0","id":1,"method":"screendump","params":{"path":"/tmp/a b\n.png"}}"#,
            ),
        ] {
            let line = call_line(1, &request).unwrap();
            assert_eq!(line, format!("{golden}\n"));
            let call = read_call(line.as_bytes()).unwrap();
            assert_eq!(call, Call { id: Some(1.into()), request });
        }
    }

    #[test]
    fn answers_and_events_look_like_this() {
        let now = serde_json::to_value(Now { state: MachineState::Paused }).unwrap();
        let error = WireError::new(Code::NotNow, "cannot pause a machine that is paused");
        let event = Event::State { state: MachineState::Running };
        for (line, golden, message) in [
            (
                answer_line(&1.into(), &Ok(now.clone())),
                r#"{"jsonrpc":"2.0","id":1,"result":{"state":"paused"}}"#,
                Message::Answer { id: 1.into(), result: Ok(now) },
            ),
            (
                answer_line(&"a".into(), &Err(error.clone())),
                r#"{"jsonrpc":"2.0","id":"a","error":{"code":-32000,"message":"cannot pause a machine that is paused"}}"#,
                Message::Answer { id: "a".into(), result: Err(error) },
            ),
            (
                event_line(&event),
                r#"{"jsonrpc":"2.0","method":"event","params":{"event":"state","state":"running"}}"#,
                Message::Event(Some(event)),
            ),
        ] {
            assert_eq!(line, format!("{golden}\n"));
            assert_eq!(read_message(line.as_bytes()).unwrap(), message);
        }
    }

    #[test]
    fn what_newer_machines_say_is_understood_as_far_as_it_goes() {
        let line = br#"{"jsonrpc":"2.0","method":"event","params":{"event":"moved","to":"b"}}"#;
        assert_eq!(read_message(line).unwrap(), Message::Event(None));
        let line = br#"{"jsonrpc":"2.0","id":4,"result":null,"more":1}"#;
        let answer = Message::Answer { id: 4.into(), result: Ok(Value::Null) };
        assert_eq!(read_message(line).unwrap(), answer);
        let line = br#"{"jsonrpc":"2.0","id":4,"error":{"code":-32050,"message":"m","data":[]}}"#;
        assert!(matches!(read_message(line), Ok(Message::Answer { result: Err(_), .. })));
        assert!(read_message(b"{}").is_err());
    }

    #[test]
    fn lines_that_are_no_requests() {
        use Code::{BadParams, BadRequest, Parse, UnknownMethod};
        for (line, code, id) in [
            ("", Parse, Some(Value::Null)),
            ("{", Parse, Some(Value::Null)),
            ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"status\"} x", Parse, Some(Value::Null)),
            ("[]", BadRequest, Some(Value::Null)),
            ("7", BadRequest, Some(Value::Null)),
            ("{}", BadRequest, Some(Value::Null)),
            (r#"{"id":1,"method":"status"}"#, BadRequest, Some(1.into())),
            (r#"{"jsonrpc":"1.0","id":1,"method":"status"}"#, BadRequest, Some(1.into())),
            (r#"{"jsonrpc":"2.0","id":{},"method":"status"}"#, BadRequest, Some(Value::Null)),
            (r#"{"jsonrpc":"2.0","id":"x","method":4}"#, BadRequest, Some("x".into())),
            (r#"{"jsonrpc":"2.0","id":"x"}"#, BadRequest, Some("x".into())),
            (r#"{"jsonrpc":"2.0","id":2,"method":"no"}"#, UnknownMethod, Some(2.into())),
            (r#"{"jsonrpc":"2.0","id":null,"method":"no"}"#, UnknownMethod, Some(Value::Null)),
            (r#"{"jsonrpc":"2.0","method":"no"}"#, UnknownMethod, None),
            (r#"{"jsonrpc":"2.0","id":2,"method":"quit","params":[1]}"#, BadParams, Some(2.into())),
        ] {
            let refusal = read_call(line.as_bytes()).unwrap_err();
            assert_eq!((refusal.error.code, &refusal.id), (code.number(), &id), "{line}");
        }
        assert_eq!(read_call(b"\xff\xfe{}").unwrap_err().error.code, Parse.number());
        let deep = "[".repeat(100_000);
        assert_eq!(read_call(deep.as_bytes()).unwrap_err().error.code, Parse.number());
        let quiet = read_call(br#"{"jsonrpc":"2.0","method":"pause"}"#).unwrap();
        assert_eq!(quiet.id, None);
    }

    proptest! {
        #[test]
        fn no_line_is_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_call(&bytes);
            let _ = read_message(&bytes);
        }
    }
}
