//! Clients against a control thread that is only a loop.

use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::sync::mpsc::{Receiver, channel};

use lodge_devices::display::{Picture, Screen, Update};
use lodge_devices::input::{InputEvent, Key};
use lodge_model::control::wire::{self, read_message};
use lodge_model::control::{Event, MAX_LINE, Request};
use lodge_model::exit::ExitReason;
use lodge_model::state::MachineEvent;
use serde_json::json;

use super::*;

struct Red;

impl Screen for Red {
    fn refresh(&self, picture: &mut Picture) -> Update {
        *picture = Picture { width: 2, height: 1, pixels: vec![0x00ff_0000; 2] };
        Update { resized: true, dirty: picture.whole().into_iter().collect(), cursor: None }
    }

    fn suggest_size(&self, _: u32, _: u32) -> bool {
        false
    }
}

struct Place {
    folder: tempfile::TempDir,
    messages: Receiver<Message>,
    server: ControlServer,
    typed: Arc<Mutex<Vec<InputEvent>>>,
}

impl Place {
    fn new(with_display: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let spec = MachineSpec {
            name: "web".into(),
            control: Some(ControlPlace::Path(path)),
            ..MachineSpec::default()
        };
        let socket = ControlSocket::claim(&spec).unwrap().unwrap();
        let (sender, messages) = channel();
        let typed: Arc<Mutex<Vec<InputEvent>>> = Arc::default();
        let keyboard = typed.clone();
        let input = Arc::new(move |events: &[InputEvent]| keyboard.lock().unwrap().extend(events));
        let display = with_display.then(|| Arc::new(Display::start(Arc::new(Red)).unwrap()));
        let server = socket.serve(sender, display, input).unwrap();
        Self { folder, messages, server, typed }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn client(&self) -> Client {
        Client::new(&self.path())
    }
}

struct Client {
    socket: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Client {
    fn new(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let reader = BufReader::new(socket.try_clone().unwrap());
        Self { socket, reader }
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line
    }

    fn message(&mut self) -> wire::Message {
        read_message(self.line().as_bytes()).unwrap()
    }

    fn ask(&mut self, request: &Request) -> Result<Value, WireError> {
        self.send(wire::call_line(9, request).unwrap());
        match self.message() {
            wire::Message::Answer { id, result } => {
                assert_eq!(id, 9);
                result
            }
            event => panic!("{event:?}"),
        }
    }

    /// The code of the error that comes next.
    fn error(&mut self) -> i64 {
        match self.message() {
            wire::Message::Answer { result: Err(error), .. } => error.code,
            other => panic!("{other:?}"),
        }
    }

    fn assert_ended(&mut self) {
        assert_eq!(self.reader.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn it_says_who_it_is_without_the_control_thread() {
    let place = Place::new(false);
    let hello = place.client().ask(&Request::Hello).unwrap();
    assert_eq!(hello["protocol"], 1);
    assert_eq!(hello["name"], "web");
    assert_eq!(hello["methods"], json!(Request::METHODS));
}

#[test]
fn what_is_no_request_is_answered_and_harms_nothing() {
    let place = Place::new(false);
    let mut client = place.client();
    client.send("{\"jsonrpc\n\n  \n\x00\x01\u{ff}\n[]\n");
    assert_eq!(client.error(), Code::Parse.number());
    assert_eq!(client.error(), Code::Parse.number());
    assert_eq!(client.error(), Code::BadRequest.number());
    client.send(r#"{"jsonrpc":"2.0","id":1,"method":"fly"}"#);
    client.send("\n");
    assert_eq!(client.error(), Code::UnknownMethod.number());
    // Nobody wants to know.
    client.send("{\"jsonrpc\":\"2.0\",\"method\":\"fly\"}\n");
    client.ask(&Request::Hello).unwrap();
    // Half a line, and then the end.
    client.send("{\"jsonrpc\":\"2.0\",");
    client.socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.error(), Code::Parse.number());
    client.assert_ended();
    place.client().ask(&Request::Hello).unwrap();
}

#[test]
fn a_line_that_is_too_long_ends_the_connection() {
    let place = Place::new(false);
    let mut client = place.client();
    let long = format!("{}\n", " ".repeat(MAX_LINE - 1));
    assert_eq!(long.len(), MAX_LINE);
    client.send(&long);
    client.ask(&Request::Hello).unwrap();
    client.send("x".repeat(MAX_LINE));
    assert_eq!(client.error(), Code::BadRequest.number());
    client.assert_ended();
}

#[test]
fn more_connections_than_there_can_be_are_told_so() {
    let place = Place::new(false);
    let mut clients: Vec<_> = (0..MOST_CONNECTIONS).map(|_| place.client()).collect();
    for client in &mut clients {
        client.ask(&Request::Hello).unwrap();
    }
    for _ in 0..100 {
        let mut late = place.client();
        assert_eq!(late.error(), Code::Refused.number());
        late.assert_ended();
    }
    clients.pop();
    // Its thread sees the end at its own time.
    for attempt in 0.. {
        let mut client = place.client();
        // It may be told off and gone before it has asked.
        let _ = client.socket.write_all(wire::call_line(1, &Request::Hello).unwrap().as_bytes());
        if matches!(client.message(), wire::Message::Answer { result: Ok(_), .. }) {
            break;
        }
        assert!(attempt < 1000);
        std::thread::sleep(Duration::from_millis(10));
    }
    clients[0].ask(&Request::Hello).unwrap();
}

#[test]
fn pictures_are_written_whole_and_to_files_only() {
    let place = Place::new(true);
    let mut client = place.client();
    let target = place.folder.path().join("a.png");
    let dump = |path: &Path| {
        let path = path.to_owned();
        Request::Screendump(lodge_model::control::Screendump { path })
    };
    for _ in 0..2 {
        let answer = client.ask(&dump(&target)).unwrap();
        assert_eq!(answer, json!({"path": target, "width": 2, "height": 1}));
        let png = png::Decoder::new(BufReader::new(std::fs::File::open(&target).unwrap()));
        let reader = png.read_info().unwrap();
        assert_eq!((reader.info().width, reader.info().height), (2, 1));
    }
    for path in ["/dev/null", "/no/such/folder/a.png", "/"] {
        let error = client.ask(&dump(Path::new(path))).unwrap_err();
        assert_eq!(error.code, Code::Failed.number(), "{error}");
        assert!(error.message.contains(path), "{error}");
    }
    let error = client.ask(&dump(Path::new("a.png"))).unwrap_err();
    assert_eq!(error.code, Code::BadParams.number());
    // The socket and the picture: nothing is left of it all.
    assert_eq!(std::fs::read_dir(place.folder.path()).unwrap().count(), 2);
    let error = Place::new(false).client().ask(&dump(&target)).unwrap_err();
    assert_eq!(error.code, Code::Missing.number());
    assert!(error.message.contains("--video vga"), "{error}");
}

#[test]
fn keys_are_pressed_together_and_one_after_the_other() {
    let place = Place::new(false);
    let mut client = place.client();
    let keys = |text: &str| Request::SendKey(lodge_model::control::SendKey { keys: text.into() });
    client.send(wire::call_line(9, &keys("ctrl-a ret")).unwrap());
    for _ in 0..3 {
        next(&place.messages).is(MachineState::Running);
    }
    assert!(matches!(client.message(), wire::Message::Answer { result: Ok(_), .. }));
    let typed = place.typed.lock().unwrap().clone();
    let expected = [(29, true), (30, true), (30, false), (29, false), (28, true), (28, false)];
    assert_eq!(typed, expected.map(|(code, down)| InputEvent::Key(Key(code), down)));
    for bad in ["", "  ", "ctrl-nokey", &"a ".repeat(257)] {
        let error = client.ask(&keys(bad)).unwrap_err();
        assert_eq!(error.code, Code::BadParams.number(), "{error}");
    }
    assert_eq!(place.typed.lock().unwrap().len(), 6, "nothing of a bad text is typed");
}

/// The task of the next message, and the way to answer it.
fn next(messages: &Receiver<Message>) -> crate::control::Call {
    match messages.recv_timeout(Duration::from_secs(60)).unwrap() {
        Message::Call(call) => call,
        other => panic!("{other:?}"),
    }
}

#[test]
fn watchers_get_events_until_the_end_and_the_others_their_answers() {
    let place = Place::new(false);
    let mut watcher = place.client();
    watcher.send(wire::call_line(1, &Request::Watch).unwrap());
    let queue = next(&place.messages).watch(MachineState::Running);
    assert_eq!(
        watcher.line(),
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"state\":\"running\"}}\n"
    );
    queue.try_send(MachineEvent::State(MachineState::Paused)).unwrap();
    queue.try_send(MachineEvent::Stopped(ExitReason::PoweredOff)).unwrap();
    let mut waiting = place.client();
    waiting.send(wire::call_line(2, &Request::Status).unwrap());
    let unanswered = next(&place.messages);
    drop(queue);
    // As a machine ends: its control thread is gone, then its socket goes.
    let Place { folder, messages, server, .. } = place;
    drop((unanswered, messages));
    drop(server);
    assert!(!folder.path().join("s").exists());
    let paused = Event::State { state: MachineState::Paused };
    assert_eq!(watcher.message(), wire::Message::Event(Some(paused)));
    let stopped = Event::Stopped { reason: "the guest powered off".into(), exit_code: 0 };
    assert_eq!(watcher.message(), wire::Message::Event(Some(stopped)));
    watcher.assert_ended();
    assert_eq!(waiting.error(), Code::Failed.number());
    waiting.assert_ended();
}

#[test]
fn a_watcher_that_goes_is_forgotten() {
    let place = Place::new(false);
    let mut watcher = place.client();
    watcher.send(wire::call_line(1, &Request::Watch).unwrap());
    let queue = next(&place.messages).watch(MachineState::Running);
    watcher.line();
    drop(watcher);
    assert!(next(&place.messages).is_unwatch());
    drop(queue);
}

#[test]
fn a_client_that_does_not_read_loses_only_its_connection() {
    let place = Place::new(false);
    let mut rude = place.client();
    rude.socket.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
    let line = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"hello\"}\n".repeat(1000);
    // Until its answers have filled all buffers for longer than it is waited for.
    while rude.socket.write_all(line.as_bytes()).is_ok() {}
    place.client().ask(&Request::Hello).unwrap();
}
