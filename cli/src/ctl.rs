//! `lodge ctl`: asks a running machine on its control socket ([`lodge_model::control`]).
//!
//! | module | is about |
//! | --- | --- |
//! | this one | what is asked, and how the answer is shown |
//! | `client` | one connection |
//! | `find` | which machines run |

mod client;
mod find;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use lodge_model::control::{Event, Now, Picture, Request, Screendump, SendKey, Status};
use lodge_model::exit::ExitStatus;
use lodge_model::state::MachineRequest;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::failure::{Failure, chain};
use client::Client;
use find::Found;

/// Ask a running machine something, or list those that run.
///
/// Without a name it lists the machines of this user that run; without anything else it asks for the machine's status.
/// The machine answers on a Unix socket, JSON-RPC 2.0 with a message a line, which other programs can use just as well.
#[derive(clap::Args)]
#[command(after_long_help = LONG_HELP)]
pub struct Args {
    /// The machine's name, or the path of its control socket (with a slash in it).
    name: Option<OsString>,

    /// Print what the machine answers as JSON.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    action: Option<Action>,
}

const LONG_HELP: &str = "\
Examples:
  Which machines run:
      lodge ctl
  What is on the screen of the machine web:
      lodge ctl web screendump web.png
  Type on its keyboard:
      lodge ctl web send-key ctrl-alt-f2
      lodge ctl web send-key r o o t ret
  Have its guest power off, and end it if the guest does not:
      lodge ctl web power-button
      lodge ctl web quit
  A machine that was started without --name is called guest, and the number of its process
  where there are several of them:
      lodge ctl guest-4711 pause
  What else can talk to it (the socket is in the runtime directory, $XDG_RUNTIME_DIR or /run):
      echo '{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"status\"}' | nc -NU /run/lodge/web.sock

The exit code is 0 if it was done, 1 if it could not be, 2 if there is no such machine.
";

/// What is asked.
#[derive(Subcommand)]
enum Action {
    /// Print what the machine does (this is also what happens without an action).
    Status,
    /// Make the machine stand still.
    Pause,
    /// Let it go on.
    Resume,
    /// Start its guest anew, as the reset button does. What the guest has not written is lost.
    Reset,
    /// Press its power button: the guest is asked to power off.
    PowerButton,
    /// End it now, without asking the guest. What the guest has not written is lost.
    Quit,
    /// Print what happens to it, a line each, until it ends.
    Watch,
    /// Write what its display shows to a file.
    Screendump {
        /// The picture: a PNG file. One that exists is replaced.
        #[arg(value_name = "FILE.png")]
        file: PathBuf,
    },
    /// Type on its keyboard: names of keys, such as a, ret, f2, ctrl-alt-delete, one after the other.
    SendKey {
        /// What is pressed; keys that are pressed together have hyphens between.
        #[arg(required = true, value_name = "KEYS", allow_hyphen_values = true)]
        keys: Vec<String>,
    },
}

/// Does it.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let found = find::machines();
    let Some(name) = args.name else {
        if args.action.is_some() {
            let help = format!("say which machine: lodge ctl NAME ...; {}", running(&found));
            return Err(Failure::request("no machine is named", help));
        }
        return list(&found, args.json);
    };
    let path = find::socket_of(&name, &found)
        .ok_or_else(|| no_such_machine(&name.to_string_lossy(), &found))?;
    let mut client = Client::connect(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            no_such_machine(&path.to_string_lossy(), &found)
        }
        _ => Failure::failed(
            format!("cannot reach the machine at '{}': {error}", path.display()),
            "only root and the user who started a machine may ask it",
        ),
    })?;
    let shown = name.to_string_lossy();
    let action = args.action.unwrap_or(Action::Status);
    if matches!(action, Action::Watch) {
        return watch(&mut client, &shown, args.json);
    }
    let request = request(&action)?;
    let answer = ask(&mut client, &shown, &request)?;
    if matches!(action, Action::Quit) {
        // Its name and its images are free when it is gone.
        client.wait_for_end();
    }
    if args.json {
        print(&format!("{answer}\n"))?;
    } else {
        print(&words(&action, &shown, answer)?)?;
    }
    Ok(ExitStatus::Ok.into())
}

fn request(action: &Action) -> Result<Request, Failure> {
    Ok(match action {
        Action::Status => Request::Status,
        Action::Pause => Request::Machine(MachineRequest::Pause),
        Action::Resume => Request::Machine(MachineRequest::Resume),
        Action::Reset => Request::Machine(MachineRequest::Reset),
        Action::PowerButton => Request::Machine(MachineRequest::PowerButton),
        Action::Quit => Request::Machine(MachineRequest::End),
        Action::Watch => Request::Watch,
        Action::Screendump { file } => {
            // The machine writes it, and has a current directory of its own.
            let path = std::path::absolute(file).map_err(|error| {
                let message = format!("cannot tell where '{}' is: {error}", file.display());
                Failure::request(message, "give another file")
            })?;
            Request::Screendump(Screendump { path })
        }
        Action::SendKey { keys } => Request::SendKey(SendKey { keys: keys.join(" ") }),
    })
}

/// The answer as people read it.
fn words(action: &Action, name: &str, answer: Value) -> Result<String, Failure> {
    let now = |answer| understood::<Now>(name, answer).map(|now| now.state);
    Ok(match action {
        Action::Status => {
            let status: Status = understood(name, answer)?;
            let display = if status.display { "a display" } else { "no display" };
            let vcpus = if status.cpus == 1 { "vCPU" } else { "vCPUs" };
            format!(
                "{} is {}: {} {vcpus}, {} of memory, {display}, process {}\n",
                status.name, status.state, status.cpus, status.memory, status.pid
            )
        }
        Action::Pause | Action::Resume | Action::Watch => {
            format!("{name} is {}\n", now(answer)?)
        }
        Action::Reset => format!("{name} was reset and is {}\n", now(answer)?),
        Action::SendKey { .. } => String::new(),
        Action::PowerButton => format!("the guest of {name} was asked to power off\n"),
        Action::Quit => format!("{name} has ended\n"),
        Action::Screendump { .. } => {
            let picture: Picture = understood(name, answer)?;
            format!("'{}': {}x{} pixels\n", picture.path.display(), picture.width, picture.height)
        }
    })
}

fn ask(client: &mut Client, name: &str, request: &Request) -> Result<Value, Failure> {
    let answer = client.ask(request).map_err(|error| broken(name, &error))?;
    answer.map_err(|error| {
        let message = format!("{name} cannot do '{}': {error}", request.method());
        Failure::failed(message, "")
    })
}

fn understood<T: DeserializeOwned>(name: &str, answer: Value) -> Result<T, Failure> {
    serde_json::from_value(answer).map_err(|error| {
        let message = format!("cannot understand what {name} answers: {}", chain(&error));
        Failure::failed(message, "it is of another version of Lodge: --json prints its answer")
    })
}

fn broken(name: &str, error: &io::Error) -> Failure {
    Failure::failed(
        format!("{name} does not answer: {error}"),
        "its process may hang or be stopped; lodge ctl lists the machines with their processes",
    )
}

fn watch(client: &mut Client, name: &str, json: bool) -> Result<ExitCode, Failure> {
    let first = ask(client, name, &Request::Watch)?;
    let now: Now = understood(name, first)?;
    let mut event = Some(Event::State { state: now.state });
    loop {
        if let Some(event) = &event {
            let line = match event {
                _ if json => serde_json::to_string(event).unwrap_or_default(),
                Event::State { state } => format!("{name} is {state}"),
                Event::GuestReset => format!("{name} was reset by its guest"),
                Event::Stopped { reason, .. } => format!("{name} has ended: {reason}"),
            };
            print(&format!("{line}\n"))?;
            if matches!(event, Event::Stopped { .. }) {
                return Ok(ExitStatus::Ok.into());
            }
        }
        event = client.next_event().map_err(|error| broken(name, &error))?;
    }
}

fn list(found: &[Found], json: bool) -> Result<ExitCode, Failure> {
    if json {
        let answers: Vec<_> = found.iter().filter_map(|found| found.status.as_ref().ok()).collect();
        // Nothing in it that JSON cannot hold.
        let text = serde_json::to_string(&answers).unwrap_or_default();
        print(&format!("{text}\n"))?;
        return Ok(ExitStatus::Ok.into());
    }
    if found.is_empty() {
        print("no machine runs\n")?;
        return Ok(ExitStatus::Ok.into());
    }
    let width = found.iter().map(|found| found.name.len()).chain([4]).max().unwrap_or(4);
    let mut text = format!("{:width$}  STATE     PROCESS  VCPUS  MEMORY\n", "NAME");
    for Found { name, status, .. } in found {
        text += &match status {
            Ok(Status { state, pid, cpus, memory, .. }) => {
                // The formatted texts are padded, which their types do not do by themselves.
                let (state, memory) = (state.to_string(), memory.to_string());
                format!("{name:width$}  {state:8}  {pid:7}  {cpus:5}  {memory}\n")
            }
            Err(why) => format!("{name:width$}  does not answer: {why}\n"),
        };
    }
    print(&text)?;
    Ok(ExitStatus::Ok.into())
}

fn no_such_machine(name: &str, found: &[Found]) -> Failure {
    Failure::request(format!("no machine named {name} runs"), running(found))
}

fn running(found: &[Found]) -> String {
    match found {
        [] => "no machine of this user runs".into(),
        found => {
            let names: Vec<_> = found.iter().map(|found| found.name.as_str()).collect();
            format!("these run: {}", names.join(", "))
        }
    }
}

fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| Failure::failed(format!("cannot print the answer: {error}"), ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::json;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &str) -> Args {
        Line::try_parse_from(["ctl"].into_iter().chain(line.split_whitespace())).unwrap().args
    }

    #[test]
    fn a_name_then_what_is_asked() {
        let asked = |line: &str| {
            let args = args(line);
            let request = args.action.as_ref().map(|action| request(action).unwrap());
            (args.name.map(|name| name.into_string().unwrap()), request, args.json)
        };
        assert_eq!(asked(""), (None, None, false));
        assert_eq!(asked("web"), (Some("web".into()), None, false));
        let pause = Request::Machine(MachineRequest::Pause);
        assert_eq!(asked("web pause"), (Some("web".into()), Some(pause), false));
        let button = Request::Machine(MachineRequest::PowerButton);
        assert_eq!(asked("web power-button --json"), (Some("web".into()), Some(button), true));
        assert_eq!(asked("status"), (None, Some(Request::Status), false));
        let path = std::env::current_dir().unwrap().join("a.png");
        let dump = Request::Screendump(Screendump { path });
        assert_eq!(asked("web screendump a.png").1, Some(dump));
        let keys = Request::SendKey(SendKey { keys: "ctrl-alt-f2 - ret".into() });
        assert_eq!(asked("web send-key ctrl-alt-f2 - ret").1, Some(keys));
        assert!(Line::try_parse_from(["ctl", "web", "send-key"]).is_err());
        assert!(Line::try_parse_from(["ctl", "web", "explode"]).is_err());
        assert!(Line::try_parse_from(["ctl", "web", "screendump"]).is_err());
    }

    #[test]
    fn answers_in_words() {
        let status = json!({"name": "web", "pid": 7, "state": "running", "cpus": 1, "memory": "1G", "display": true, "new": 1});
        assert_eq!(
            words(&Action::Status, "web", status).unwrap(),
            "web is running: 1 vCPU, 1G of memory, a display, process 7\n"
        );
        let paused = json!({"state": "paused"});
        assert_eq!(words(&Action::Pause, "web", paused.clone()).unwrap(), "web is paused\n");
        assert_eq!(words(&Action::Reset, "web", paused).unwrap(), "web was reset and is paused\n");
        let error = words(&Action::Pause, "web", json!([])).unwrap_err();
        assert!(error.to_string().contains("another version"), "{error}");
    }
}
