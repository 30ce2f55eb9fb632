//! Models fetched from a hub by the program itself. The hub is a server in this process that answers the requests of
//! the hub's protocol: the list of a repository, and files by byte range with their commit and checksum.
#![cfg(feature = "hub")]

mod common;

use common::program::{Ended, Home, text};
use common::tiny::Tiny;
use longsight::model::{Arch, Quant};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub on this machine that has one repository, `org/tiny`.
struct Hub {
    address: String,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    files: BTreeMap<String, Vec<u8>>,
    /// Asked for in the request's head; without it: 401.
    token: Option<&'static str>,
    /// Files of which the next answer breaks off halfway.
    broken: Mutex<Vec<String>>,
    /// `file range` of every request for content.
    asked: Mutex<Vec<String>>,
}

impl Hub {
    fn new(files: BTreeMap<String, Vec<u8>>, token: Option<&'static str>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared { files, token, ..Shared::default() });
        let hub = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hub = hub.clone();
                // A client that goes away is no failure of the hub.
                std::thread::spawn(move || hub.serve(stream).ok());
            }
        });
        Hub { address, shared }
    }

    /// Of a folder.
    fn of(folder: &Path, token: Option<&'static str>) -> Hub {
        let files = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
        let file = |f: &Path| f.file_name().unwrap().to_str().unwrap().to_owned();
        Hub::new(files.map(|f| (file(&f), std::fs::read(&f).unwrap())).collect(), token)
    }

    fn asked(&self) -> Vec<String> {
        self.shared.asked.lock().unwrap().clone()
    }

    fn breaks_off(&self, file: &str) {
        self.shared.broken.lock().unwrap().push(file.to_owned());
    }

    fn run_with(&self, home: &Home, more: &[(&str, &str)], model: &str) -> Ended {
        run(home, &[&[("HF_ENDPOINT", &*self.address)], more].concat(), model)
    }

    fn run(&self, home: &Home, model: &str) -> Ended {
        self.run_with(home, &[], model)
    }
}

fn run(home: &Home, environment: &[(&str, &str)], model: &str) -> Ended {
    let mut command = home.command(&["run", "-m", model, "-d", "cpu", "-n", "4", "a text"]);
    for proxy in [
        "ALL_PROXY",
        "all_proxy",
        "HTTP_PROXY",
        "http_proxy",
        "HTTPS_PROXY",
        "https_proxy",
        "HF_TOKEN",
    ] {
        command.env_remove(proxy);
    }
    command.env("HF_HOME", home.path("hub")).envs(environment.iter().copied());
    let done = command.output().unwrap();
    Ended {
        code: done.status.code(),
        out: String::from_utf8(done.stdout).unwrap(),
        err: String::from_utf8(done.stderr).unwrap(),
    }
}

/// The run ends with a sentence that holds `names`.
#[track_caller]
fn says(end: &Ended, names: &[&str]) {
    assert!(end.code.is_some_and(|c| c != 0 && c != 101), "{end:?}");
    assert!(end.err.lines().any(|l| l.starts_with("error: ")), "{end:?}");
    for name in names {
        assert!(end.err.contains(name), "{} does not name {name}", end.err);
    }
}

impl Shared {
    /// One request a connection.
    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let (mut target, mut start, mut token) = (String::new(), 0, String::new());
        let mut only_first = false;
        for (i, line) in BufReader::new(stream.try_clone()?).lines().enumerate() {
            let line = line?;
            if i == 0 {
                target = line.split(' ').nth(1).unwrap_or_default().to_owned();
            } else if line.is_empty() {
                break;
            } else if let Some((name, value)) = line.split_once(": ") {
                match name.to_ascii_lowercase().as_str() {
                    "range" => {
                        let range = value.trim_start_matches("bytes=");
                        only_first = range == "0-0";
                        start = range.split('-').next().unwrap().parse().unwrap();
                    }
                    "authorization" => token = value.trim_start_matches("Bearer ").to_owned(),
                    _ => {}
                }
            }
        }
        if self.token.is_some_and(|t| t != token) {
            return answer(&mut stream, "401 Unauthorized", "", b"");
        }
        if target.starts_with("/api/models/org/tiny") {
            let names = self.files.keys().map(|f| format!("{{\"rfilename\":\"{f}\"}}"));
            let names = names.collect::<Vec<_>>().join(",");
            let list = format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[{names}]}}");
            return answer(&mut stream, "200 OK", "", list.as_bytes());
        }
        let name = target.strip_prefix("/org/tiny/resolve/main/").unwrap_or_default();
        let Some(bytes) = self.files.get(name) else {
            return answer(&mut stream, "404 Not Found", "", b"");
        };
        let end = if only_first { 1 } else { bytes.len() };
        let head = format!(
            "ETag: \"{name}-of-{}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{}/{}\r\n",
            bytes.len(),
            end - 1,
            bytes.len()
        );
        if only_first {
            return answer(&mut stream, "206 Partial Content", &head, &bytes[..1]);
        }
        self.asked.lock().unwrap().push(format!("{name} {start}"));
        let mut broken = self.broken.lock().unwrap();
        if let Some(i) = broken.iter().position(|b| b == name) {
            broken.remove(i);
            write!(stream, "HTTP/1.1 206 Partial Content\r\nConnection: close\r\n{head}")?;
            write!(stream, "Content-Length: {}\r\n\r\n", end - start)?;
            return stream.write_all(&bytes[start..(start + end) / 2]);
        }
        drop(broken);
        answer(&mut stream, "206 Partial Content", &head, &bytes[start..])
    }
}

fn answer(stream: &mut TcpStream, status: &str, head: &str, body: &[u8]) -> std::io::Result<()> {
    let n = body.len();
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n{head}Content-Length: {n}\r\n\r\n")?;
    stream.write_all(body)
}

/// A folder with the tiny model in so many shards.
fn sharded(home: &Home, shards: usize) -> std::path::PathBuf {
    let folder = home.path("origin");
    Tiny::new(Arch::Llama, false, 5).write_hf(&folder, Quant::F32, shards);
    folder
}

#[test]
fn a_repository_is_fetched_once_and_answers_like_the_folder() {
    let home = Home::new();
    let folder = sharded(&home, 3);
    let want = run(&home, &[], &text(&folder));
    assert_eq!(want.code, Some(0), "{want:?}");
    let hub = Hub::of(&folder, None);
    let got = hub.run(&home, "org/tiny");
    assert_eq!((got.code, &got.out), (Some(0), &want.out), "{got:?}");
    let asked = hub.asked();
    assert_eq!(asked.iter().filter(|a| a.contains(".safetensors ")).count(), 3, "{asked:?}");
    assert!(asked.iter().all(|a| a.ends_with(" 0")), "nothing is fetched in pieces: {asked:?}");

    // What is there is not asked for again, with a hub and without one.
    assert_eq!(hub.run(&home, "org/tiny").out, want.out);
    assert_eq!(hub.asked(), asked);
    let alone = run(&home, &[("HF_ENDPOINT", "http://127.0.0.1:9")], "org/tiny");
    assert_eq!((alone.code, &alone.out), (Some(0), &want.out), "{alone:?}");
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_broke() {
    let home = Home::new();
    let folder = sharded(&home, 1);
    let want = run(&home, &[], &text(&folder));
    let hub = Hub::of(&folder, None);
    hub.breaks_off("model.safetensors");
    let got = hub.run(&home, "org/tiny");
    assert_eq!((got.code, &got.out), (Some(0), &want.out), "{got:?}");
    let half = hub.shared.files["model.safetensors"].len() / 2;
    let weights = hub.asked().into_iter().filter(|a| a.starts_with("model.safetensors "));
    let want = ["model.safetensors 0".to_owned(), format!("model.safetensors {half}")];
    assert_eq!(weights.collect::<Vec<_>>(), want);

    // One that breaks too often is an error; the next run goes on from there.
    let home = Home::new();
    for _ in 0..3 {
        hub.breaks_off("model.safetensors");
    }
    let end = hub.run(&home, "org/tiny");
    says(&end, &["org/tiny", "model.safetensors", "network"]);
    let before = hub.asked().len();
    assert_eq!(hub.run(&home, "org/tiny").out, got.out);
    let last: Vec<String> = hub.asked().split_off(before);
    assert!(last.len() == 1 && !last[0].ends_with(" 0"), "{last:?}");
}

#[test]
fn a_gguf_file_is_named_and_fetched() {
    let home = Home::new();
    let gguf = home.path("m.gguf");
    Tiny::new(Arch::Llama, false, 5).write_gguf(&gguf, Quant::Q8_0);
    let want = run(&home, &[], &text(&gguf));
    let bytes = std::fs::read(&gguf).unwrap();
    let hub = Hub::new([("small/q8.gguf".to_owned(), bytes)].into(), None);
    says(&hub.run(&home, "org/tiny"), &["org/tiny:small/q8.gguf"]);
    let got = hub.run(&home, "org/tiny:small/q8.gguf");
    assert_eq!((got.code, &got.out), (Some(0), &want.out), "{got:?}");
    says(&hub.run(&home, "org/tiny:other.gguf"), &["org/tiny", "other.gguf"]);
}

#[test]
fn what_a_hub_does_not_give_is_a_sentence() {
    let home = Home::new();
    let hub = Hub::of(&sharded(&home, 1), Some("secret"));
    // Without a token the repository is closed; the sentence says how to bring one.
    says(&hub.run(&home, "org/tiny"), &["org/tiny", "HF_TOKEN"]);
    assert_eq!(hub.run_with(&home, &[("HF_TOKEN", "secret\n")], "org/tiny").code, Some(0));
    let other = Hub::new([("README.md".to_owned(), b"text".to_vec())].into(), None);
    let home = Home::new();
    says(&other.run(&home, "org/tiny"), &["org/tiny", "neither safetensors nor GGUF"]);
    says(&other.run(&home, "org/unknown"), &["org/unknown", "check the name"]);
    let nobody = run(&home, &[("HF_ENDPOINT", "http://127.0.0.1:9")], "org/tiny");
    says(&nobody, &["org/tiny", "network"]);
}
