//! `lodge-vmm --spec-fd N`: runs one machine until it is over. Started by `lodge run`.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use lodge_model::exit::{ExitReason, ExitStatus};
use lodge_model::host::HostFacts;
use lodge_model::spec::{self, Console, MachineSpec};
use lodge_vmm::control::{self, Message};
use lodge_vmm::control_socket::ControlSocket;
use lodge_vmm::display::{self, Display};
use lodge_vmm::terminal::{self, RawTerminal};
use lodge_vmm::{Error, Machine, chain, viewers};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing_subscriber::EnvFilter;

const USAGE: &str = "\
Runs one machine until its guest powers off. `lodge run` starts it; see `lodge run --help`.

Usage: lodge-vmm --spec-fd N     the machine's spec as JSON, on an open file descriptor
       lodge-vmm --spec FILE     the same, from a file
";

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("LODGE_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).without_time().init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let source = match arguments[..] {
        ["--spec-fd", number] => format!("/proc/self/fd/{number}"),
        ["--spec", path] => path.to_owned(),
        ["--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{USAGE}");
            return ExitStatus::BadRequest.into();
        }
    };
    match read_spec(&source).and_then(run) {
        Ok(reason) => {
            if reason != ExitReason::PoweredOff {
                eprintln!("lodge: {reason}");
            }
            reason.status().into()
        }
        Err(error) => {
            eprintln!("lodge: {}", chain(&error));
            error.status().into()
        }
    }
}

fn read_spec(source: &str) -> Result<MachineSpec, Error> {
    let mut text = String::new();
    File::open(source)
        .and_then(|mut file| file.read_to_string(&mut text))
        .map_err(|error| Error::Spec(error.into()))?;
    serde_json::from_str(&text).map_err(|error| Error::Spec(error.into()))
}

fn run(spec: MachineSpec) -> Result<ExitReason, Error> {
    spec.validate(&HostFacts::gather(&spec)).map_err(|p| Error::Invalid(p.to_string()))?;
    let (sender, messages) = channel();
    let interactive = spec.console == Console::Stdio;
    let (viewed, screenshot) = (spec.display.clone(), spec.screenshot.clone());
    let name = spec.name.clone();
    let control_socket = ControlSocket::claim(&spec)?;
    let (machine, chosen) = Machine::new(spec, &sender)?;
    let screen = machine.screen().map(Display::start).transpose();
    let screen =
        screen.map_err(|source| Error::Host { what: "start the display's thread", source })?;
    let screen = screen.map(Arc::new);
    let _viewers = match (&viewed, &screen) {
        (spec::Display::Vnc(vnc), Some(screen)) => {
            Some(viewers::start(vnc, &name, screen.clone(), machine.input())?)
        }
        _ => None,
    };
    listen_to_signals(sender.clone())
        .map_err(|source| Error::Host { what: "listen to signals", source })?;
    // Told only now: who reads it may send a signal at once.
    eprintln!("lodge: {chosen}");
    let (for_clients, input) = (sender.clone(), machine.input());
    let _terminal = if interactive {
        let raw = RawTerminal::new()
            .map_err(|source| Error::Host { what: "make the terminal raw", source })?;
        terminal::read_input(machine.console(), sender)
            .map_err(|source| Error::Host { what: "start the terminal's thread", source })?;
        Some(raw)
    } else {
        None
    };
    // The last thing that can fail: from here on somebody hears what is asked.
    let served = control_socket.map(|socket| socket.serve(for_clients, screen.clone(), input));
    let control_server = served.transpose()?;
    let reason = control::run(machine, &messages);
    // Who still waits for an answer there gets it: nobody listens any more.
    drop(messages);
    drop(control_server);
    if let (Some(path), Some(screen)) = (screenshot, screen) {
        let file = File::create(&path)
            .map_err(|source| Error::Screenshot { path: path.clone(), source })?;
        display::write_png(&screen.picture(), file)
            .map_err(|source| Error::Screenshot { path, source })?;
    }
    Ok(reason)
}

/// SIGTERM and SIGINT ask for an end, politely at first; a terminal that hangs up takes the machine along.
fn listen_to_signals(control: Sender<Message>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            let message = match signal {
                SIGHUP => Message::Ask(lodge_model::state::MachineRequest::End),
                _ => Message::Signal,
            };
            if control.send(message).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}
