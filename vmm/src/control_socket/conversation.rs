//! What one client of the control socket asks, line by line, and what it gets.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use lodge_devices::input::{InputEvent, names};
use lodge_model::control::wire::{Call, Code, WireError, answer_line, event_line, read_call};
use lodge_model::control::{
    Hello, MAX_LINE, MOST_STROKES, Now, PROTOCOL, Picture, Request, Screendump, SendKey, Status,
};
use lodge_model::state::{MachineEvent, MachineState};
use serde_json::Value;

use super::Server;
use crate::control::{self, Refused, Task};
use crate::display::{Display, write_png};

/// Events that a watcher has not read yet; with more it is gone.
const MOST_EVENTS: usize = 64;

/// Between a key's press and its release, and before the next one.
const BETWEEN_KEYS: Duration = Duration::from_millis(20);

/// One client.
pub struct Conversation<'a> {
    /// Its number, which no other client of this machine has.
    number: u64,
    /// Where requests come from.
    input: &'a UnixStream,
    /// Where answers and events go to, a whole line at a time.
    output: Arc<Mutex<Arc<UnixStream>>>,
    server: &'a Server,
    watcher: Option<JoinHandle<()>>,
}

enum Line {
    Whole,
    TooLong,
    End,
}

impl<'a> Conversation<'a> {
    /// A conversation that has not begun.
    pub fn new(number: u64, socket: &'a Arc<UnixStream>, server: &'a Server) -> Self {
        let output = Arc::new(Mutex::new(socket.clone()));
        Self { number, input: socket, output, server, watcher: None }
    }

    /// Answers until the client goes.
    ///
    /// # Errors
    /// The connection fails, or the client does not read.
    pub fn run(mut self) -> io::Result<()> {
        let result = self.talk();
        if let Some(watcher) = self.watcher.take() {
            if result.is_err() {
                // It may be closed already. A watcher that waits for its reader waits no longer.
                let _ = self.input.shutdown(std::net::Shutdown::Both);
            }
            // Where nobody listens any more, the watcher's queue has ended by itself.
            let _ = control::call(&self.server.control, Task::Unwatch(self.number));
            // A panic of the thread has been reported by its own message.
            let _ = watcher.join();
        }
        result
    }

    fn talk(&mut self) -> io::Result<()> {
        let mut input = BufReader::new(self.input);
        let mut line = Vec::new();
        loop {
            match read_line(&mut input, &mut line)? {
                Line::End => return Ok(()),
                Line::TooLong => {
                    let what = format!("a line is longer than {MAX_LINE} bytes");
                    let error = WireError::new(Code::BadRequest, what);
                    // Where the next request begins nobody knows.
                    return send(&self.output, &answer_line(&Value::Null, &Err(error)));
                }
                Line::Whole if line.trim_ascii().is_empty() => {}
                Line::Whole => {
                    let (id, answer) = match read_call(&line) {
                        Ok(Call { id, request }) => (id, self.carry_out(request)),
                        Err(refusal) => (refusal.id, Err(refusal.error)),
                    };
                    if let Some(id) = id {
                        send(&self.output, &answer_line(&id, &answer))?;
                    }
                }
            }
        }
    }

    fn carry_out(&mut self, request: Request) -> Result<Value, WireError> {
        let now = |state| value(&Now { state });
        match request {
            Request::Hello => value(&self.hello()),
            Request::Status => {
                let state = self.ask(Task::State)?;
                value(&Status { state, ..self.server.about.clone() })
            }
            Request::Machine(request) => self.ask(Task::Ask(request)).and_then(now),
            Request::Watch => self.watch().and_then(now),
            Request::Screendump(Screendump { path }) => {
                let missing = |what| WireError::new(Code::Missing, what);
                let display = self.server.display.as_deref().ok_or_else(|| {
                    missing("the machine has no display: give it one with --video vga")
                })?;
                value(&screendump(display, &path, self.number)?)
            }
            Request::SendKey(SendKey { keys }) => self.type_keys(&keys).and_then(now),
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").into(),
            name: self.server.about.name.clone(),
            pid: self.server.about.pid,
            methods: Request::METHODS.map(str::to_owned).into(),
        }
    }

    fn ask(&self, task: Task) -> Result<MachineState, WireError> {
        control::call(&self.server.control, task).map_err(|refused| {
            let code = match &refused {
                Refused::NotNow(_) => Code::NotNow,
                Refused::Failed(_) | Refused::Over => Code::Failed,
            };
            WireError::new(code, refused.to_string())
        })
    }

    /// Presses and releases at a person's pace, as keyboards have room for few keys that a guest has not read.
    fn type_keys(&self, text: &str) -> Result<MachineState, WireError> {
        let bad = |what: String| WireError::new(Code::BadParams, what);
        let strokes: Result<Vec<_>, _> = text.split_whitespace().map(names::strokes).collect();
        let strokes = strokes.map_err(|error| bad(error.to_string()))?;
        if strokes.is_empty() || strokes.len() > MOST_STROKES {
            let what = format!("{} keys cannot be typed: 1 to {MOST_STROKES} can", strokes.len());
            return Err(bad(what));
        }
        let mut state = self.ask(Task::State)?;
        for events in strokes {
            let down = |event: &InputEvent| matches!(event, InputEvent::Key(_, true));
            let (presses, releases): (Vec<_>, Vec<_>) = events.into_iter().partition(down);
            for events in [presses, releases] {
                self.server.input.send(&events);
                std::thread::sleep(BETWEEN_KEYS);
            }
            // No longer than the machine is there.
            state = self.ask(Task::State)?;
        }
        Ok(state)
    }

    /// Has events sent from now on. A second time it changes nothing.
    fn watch(&mut self) -> Result<MachineState, WireError> {
        if self.watcher.is_some() {
            return self.ask(Task::State);
        }
        let (queue, events) = sync_channel(MOST_EVENTS);
        let output = self.output.clone();
        let thread = std::thread::Builder::new()
            .name("ctl-watcher".into())
            .spawn(move || forward(&events, &output));
        let thread = thread.map_err(|error| {
            WireError::new(Code::Failed, format!("cannot start a thread for the events: {error}"))
        })?;
        self.watcher = Some(thread);
        self.ask(Task::Watch(self.number, queue))
    }
}

/// Sends events until there are no more of them: the machine has ended, the client has gone, or it did not read.
fn forward(events: &Receiver<MachineEvent>, output: &Mutex<Arc<UnixStream>>) {
    let mut ended = false;
    for event in events {
        ended = matches!(event, MachineEvent::Stopped(_));
        if send(output, &event_line(&(&event).into())).is_err() {
            ended = false;
            break;
        }
    }
    if !ended {
        // It would believe that nothing happens. It may be closed already.
        let _ = lock(output).shutdown(std::net::Shutdown::Both);
    }
}

fn lock(output: &Mutex<Arc<UnixStream>>) -> std::sync::MutexGuard<'_, Arc<UnixStream>> {
    // It is only ever read.
    output.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send(output: &Mutex<Arc<UnixStream>>, line: &str) -> io::Result<()> {
    (&**lock(output)).write_all(line.as_bytes())
}

fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Line> {
    line.clear();
    let read = input.take(MAX_LINE as u64).read_until(b'\n', line)?;
    Ok(match line.last() {
        None => Line::End,
        Some(b'\n') => Line::Whole,
        Some(_) if read == MAX_LINE => Line::TooLong,
        // The end of the connection ends a line as well.
        Some(_) => Line::Whole,
    })
}

fn value(result: &impl serde::Serialize) -> Result<Value, WireError> {
    // Only a path that is not UTF-8 cannot be told, and none came in.
    serde_json::to_value(result).map_err(|error| WireError::new(Code::Failed, error.to_string()))
}

/// Writes the picture beside `path`, then puts it there.
fn screendump(display: &Display, path: &Path, number: u64) -> Result<Picture, WireError> {
    let failed = |why: String| {
        WireError::new(Code::Failed, format!("cannot write '{}': {why}", path.display()))
    };
    if !path.is_absolute() {
        let what = format!("'{}' is no absolute path", path.display());
        return Err(WireError::new(Code::BadParams, what));
    }
    let target = real_target(path).map_err(|error| failed(error.to_string()))?;
    let picture = display.picture();
    if picture.pixels.is_empty() {
        let what = "the display shows nothing yet: try again when the guest has started";
        return Err(WireError::new(Code::Missing, what));
    }
    let beside = target.with_extension(format!("{}-{number}.part", std::process::id()));
    let written = OpenOptions::new().write(true).create_new(true).open(&beside).and_then(|file| {
        let done = write_synced(&picture, file).and_then(|()| fs::rename(&beside, &target));
        // What is left of a failure; there is nothing more to do about it.
        done.inspect_err(|_| drop(fs::remove_file(&beside)))
    });
    written.map_err(|error| failed(error.to_string()))?;
    Ok(Picture { path: path.into(), width: picture.width, height: picture.height })
}

fn write_synced(picture: &lodge_devices::display::Picture, file: File) -> io::Result<()> {
    write_png(picture, io::BufWriter::new(&file))?;
    file.sync_all()
}

/// Where a link leads to. What is no file stays as it is: renaming over a device would replace it.
fn real_target(path: &Path) -> io::Result<PathBuf> {
    match fs::metadata(path) {
        Ok(data) if data.is_file() => fs::canonicalize(path),
        Ok(_) => Err(io::Error::other("it exists, and is no file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(path.into()),
        Err(error) => Err(error),
    }
}
