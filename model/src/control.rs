//! The control protocol of a running machine: what `lodge ctl` and `lodge-vmm` say to each other.
//!
//! ```text
//!   client (lodge ctl, lodged, a script)                      lodge-vmm
//!     {"jsonrpc":"2.0","id":1,"method":"pause"}        ------>
//!                                                      <------  {"jsonrpc":"2.0","id":1,"result":{"state":"paused"}}
//!     {"jsonrpc":"2.0","id":2,"method":"watch"}        ------>
//!                                                      <------  {"jsonrpc":"2.0","id":2,"result":{"state":"paused"}}
//!                                                      <------  {"jsonrpc":"2.0","method":"event","params":{...}}
//! ```
//!
//! It is JSON-RPC 2.0 (jsonrpc.org/specification) over a Unix socket, a message a line of UTF-8, at most [`MAX_LINE`]
//! bytes. Batches are not supported. A request without an `id` is carried out and not answered. Requests of one
//! connection are carried out one after the other.
//!
//! [`PROTOCOL`] is the version. It grows only when something that exists changes its meaning: new methods, new kinds of
//! event and new fields of a result do not count, and a client must ignore what it does not know. `hello` tells the
//! version and the methods, so that a newer client knows what an older machine can do. Unknown parameters are refused,
//! so that nobody believes that they were heeded.
//!
//! | module | is about |
//! | --- | --- |
//! | this one | requests, results, events |
//! | [`wire`] | the lines that carry them, and errors |
//! | [`place`] | where the socket is |

pub mod place;
pub mod wire;

use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::size::MemorySize;
use crate::state::{MachineEvent, MachineRequest, MachineState};
use wire::{Code, WireError};

/// The protocol's version.
pub const PROTOCOL: u32 = 1;
/// The longest line in bytes, with its end.
pub const MAX_LINE: usize = 1 << 20;

/// What can be asked on the control socket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// `hello`: who is there? Gives a [`Hello`].
    Hello,
    /// `status`: gives a [`Status`].
    Status,
    /// `pause`, `resume`, `reset`, `power-button` and `quit`: gives the [`Now`] after it.
    Machine(MachineRequest),
    /// `watch`: gives the [`Now`], and from then on each [`Event`] as it happens, until the connection ends.
    Watch,
    /// `screendump`: writes the display's picture to a file. Gives a [`Picture`].
    Screendump(Screendump),
    /// `send-key`: types on the guest's keyboard. Gives the [`Now`].
    SendKey(SendKey),
}

/// The requests of [`MachineRequest`] and their methods. A machine starts by itself: there is no method for that.
const MACHINE: [(&str, MachineRequest); 5] = [
    ("pause", MachineRequest::Pause),
    ("resume", MachineRequest::Resume),
    ("reset", MachineRequest::Reset),
    ("power-button", MachineRequest::PowerButton),
    ("quit", MachineRequest::End),
];

impl Request {
    /// All methods.
    pub const METHODS: [&str; 10] = [
        "hello",
        "status",
        "pause",
        "resume",
        "reset",
        "power-button",
        "quit",
        "watch",
        "screendump",
        "send-key",
    ];

    /// Reads a request from its method and parameters.
    ///
    /// # Errors
    /// [`Code::UnknownMethod`] or [`Code::BadParams`], with a text that says what was wrong.
    pub fn read(method: &str, params: Option<Value>) -> Result<Self, WireError> {
        if let Some((_, request)) = MACHINE.iter().find(|(name, _)| *name == method) {
            return none(method, params).map(|()| Self::Machine(*request));
        }
        match method {
            "hello" => none(method, params).map(|()| Self::Hello),
            "status" => none(method, params).map(|()| Self::Status),
            "watch" => none(method, params).map(|()| Self::Watch),
            "screendump" => some(method, params).map(Self::Screendump),
            "send-key" => some(method, params).map(Self::SendKey),
            _ => Err(WireError::new(
                Code::UnknownMethod,
                format!("unknown method {method:?}: known are {}", Self::METHODS.join(", ")),
            )),
        }
    }

    /// Its method.
    pub fn method(&self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Status => "status",
            Self::Machine(request) => {
                let found = MACHINE.iter().find(|(_, known)| known == request);
                found.map_or("start", |(name, _)| name)
            }
            Self::Watch => "watch",
            Self::Screendump(_) => "screendump",
            Self::SendKey(_) => "send-key",
        }
    }

    /// Its parameters, if it has any.
    ///
    /// # Errors
    /// A path is not UTF-8, which JSON cannot hold.
    pub fn params(&self) -> Result<Option<Value>, serde_json::Error> {
        match self {
            Self::Hello | Self::Status | Self::Machine(_) | Self::Watch => Ok(None),
            Self::Screendump(params) => serde_json::to_value(params).map(Some),
            Self::SendKey(params) => serde_json::to_value(params).map(Some),
        }
    }
}

/// A method without parameters: they may be left out, or be empty.
fn none(method: &str, params: Option<Value>) -> Result<(), WireError> {
    let empty = match &params {
        None | Some(Value::Null) => true,
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(_) => false,
    };
    let error = || WireError::new(Code::BadParams, format!("'{method}' takes no parameters"));
    empty.then_some(()).ok_or_else(error)
}

fn some<T: DeserializeOwned>(method: &str, params: Option<Value>) -> Result<T, WireError> {
    let wrong = |why: String| {
        WireError::new(Code::BadParams, format!("the parameters of '{method}' are wrong: {why}"))
    };
    match params {
        // Positions would be a second form of everything.
        Some(params @ Value::Object(_)) => {
            serde_json::from_value(params).map_err(|error| wrong(error.to_string()))
        }
        Some(_) => Err(wrong("give an object with names and values".into())),
        None => Err(wrong("there are none".into())),
    }
}

/// The parameters of `screendump`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Screendump {
    /// The file (PNG), by its absolute path: the machine has a current directory of its own. One that exists is
    /// replaced when the new one is complete.
    pub path: PathBuf,
}

/// The parameters of `send-key`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendKey {
    /// What is pressed, one after the other with spaces between; keys that are pressed together with hyphens:
    /// `ctrl-alt-delete`, `r o o t ret`. At most [`MOST_STROKES`] of them.
    pub keys: String,
}

/// The most that one `send-key` types: some ten seconds.
pub const MOST_STROKES: usize = 256;

/// Who is there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The version of Lodge.
    pub version: String,
    /// The machine's name.
    pub name: String,
    /// The machine's process.
    pub pid: u32,
    /// What can be asked.
    pub methods: Vec<String>,
}

/// What a machine is, and does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Whether it runs.
    pub state: MachineState,
    /// Its vCPUs.
    pub cpus: u32,
    /// Its memory.
    pub memory: MemorySize,
    /// Whether it has a display.
    pub display: bool,
}

/// The state after a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Now {
    /// The state.
    pub state: MachineState,
}

/// A picture that was written.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Picture {
    /// The file.
    pub path: PathBuf,
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
}

/// What a machine tells those who watch it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// Its state changed.
    State {
        /// To this.
        state: MachineState,
    },
    /// The guest reset itself, and starts anew.
    GuestReset,
    /// It stopped; nothing comes after this.
    Stopped {
        /// Why, for people.
        reason: String,
        /// The exit code of its process, as in [`crate::exit::TABLE`].
        exit_code: u8,
    },
}

impl From<&MachineEvent> for Event {
    fn from(event: &MachineEvent) -> Self {
        match event {
            MachineEvent::State(state) => Self::State { state: *state },
            MachineEvent::GuestReset => Self::GuestReset,
            MachineEvent::Stopped(reason) => {
                Self::Stopped { reason: reason.to_string(), exit_code: reason.status().code() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::ExitReason;
    use serde_json::json;

    #[test]
    fn every_method_is_read_back() {
        for method in Request::METHODS {
            let params = match method {
                "screendump" => Some(json!({"path": "/tmp/a.png"})),
                "send-key" => Some(json!({"keys": "a ret"})),
                _ => None,
            };
            let request = Request::read(method, params.clone()).unwrap();
            assert_eq!(request.method(), method);
            assert_eq!(request.params().unwrap(), params);
        }
    }

    #[test]
    fn parameters_that_are_empty_are_none() {
        for params in [None, Some(Value::Null), Some(json!({})), Some(json!([]))] {
            assert_eq!(Request::read("pause", params), Ok(Request::Machine(MachineRequest::Pause)));
        }
    }

    #[test]
    fn wrong_requests_are_told_what_is_wrong() {
        let refused = |method: &str, params: Option<Value>| {
            let error = Request::read(method, params).unwrap_err();
            (error.code, error.message)
        };
        let (code, message) = refused("explode", None);
        assert_eq!(code, Code::UnknownMethod.number());
        assert!(message.contains("explode") && message.contains("power-button"), "{message}");
        for (method, params, part) in [
            ("pause", Some(json!({"now": true})), "'pause' takes no parameters"),
            ("pause", Some(json!(7)), "takes no parameters"),
            ("screendump", None, "there are none"),
            ("screendump", Some(json!(["/a.png"])), "an object"),
            ("screendump", Some(json!({})), "missing field `path`"),
            ("screendump", Some(json!({"path": 1})), "expected"),
            ("screendump", Some(json!({"path": "/a", "format": "gif"})), "unknown field `format`"),
        ] {
            let (code, message) = refused(method, params);
            assert_eq!(code, Code::BadParams.number());
            assert!(message.contains(part), "{message}");
        }
        // There is no way to start what runs already.
        assert_eq!(refused("start", None).0, Code::UnknownMethod.number());
    }

    #[test]
    fn results_look_like_this() {
        let status = Status {
            name: "web".into(),
            pid: 7,
            state: MachineState::Running,
            cpus: 2,
            memory: MemorySize::mib(512),
            display: false,
        };
        let golden =
            r#"{"name":"web","pid":7,"state":"running","cpus":2,"memory":"512M","display":false}"#;
        assert_eq!(serde_json::to_string(&status).unwrap(), golden);
        // What a newer machine adds is ignored.
        let newer = golden.replace("}", r#","uptime":1}"#);
        assert_eq!(serde_json::from_str::<Status>(&newer).unwrap(), status);
    }

    #[test]
    fn events_look_like_this() {
        let reason = ExitReason::Crashed("triple fault of vCPU 0".into());
        for (event, golden) in [
            (MachineEvent::State(MachineState::Paused), r#"{"event":"state","state":"paused"}"#),
            (MachineEvent::GuestReset, r#"{"event":"guest-reset"}"#),
            (
                MachineEvent::Stopped(reason),
                r#"{"event":"stopped","reason":"the guest crashed: triple fault of vCPU 0","exit_code":5}"#,
            ),
        ] {
            let event = Event::from(&event);
            assert_eq!(serde_json::to_string(&event).unwrap(), golden);
            assert_eq!(serde_json::from_str::<Event>(golden).unwrap(), event);
        }
    }
}
