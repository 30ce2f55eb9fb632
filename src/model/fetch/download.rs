//! One file over HTTP, resumed where it stopped and verified before it gets its name.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use super::super::error::{ModelError, Result};
use super::{Progress, disk, file_sha256};

const ATTEMPTS: usize = 3;

/// Downloads `url` to `target` by way of `target` + `.part`, which stays for the next attempt when
/// the connection breaks and goes when the content is not what `sha256` says.
///
/// # Errors
/// `Fetch` for what the network does, `Io` for what the disk does.
pub(super) fn download(
    url: &str,
    target: &Path,
    sha256: &str,
    progress: Progress<'_>,
) -> Result<()> {
    let part = {
        let mut name = target.as_os_str().to_owned();
        name.push(".part");
        std::path::PathBuf::from(name)
    };
    let agent = ureq::AgentBuilder::new()
        .try_proxy_from_env(true)
        .timeout_connect(Duration::from_secs(20))
        .timeout_read(Duration::from_secs(60))
        .build();
    let failed = |what: String| ModelError::Fetch {
        name: target
            .file_name()
            .map_or_else(|| target.display().to_string(), |n| n.to_string_lossy().into_owned()),
        what,
    };
    let mut last = String::new();
    for _ in 0..ATTEMPTS {
        match attempt(&agent, url, &part, progress) {
            Ok(()) => {
                let found = file_sha256(&part).map_err(|e| disk(&part, "read", e))?;
                if found != sha256 {
                    fs::remove_file(&part).map_err(|e| disk(&part, "remove", e))?;
                    return Err(failed(format!(
                        "the server sent a file with sha256 {found} instead of {sha256}"
                    )));
                }
                return fs::rename(&part, target).map_err(|e| disk(target, "write", e));
            }
            Err(Broken::Disk(e)) => return Err(e),
            Err(Broken::Network(what)) => last = what,
        }
    }
    Err(failed(format!(
        "the download broke off {ATTEMPTS} times ({last}); run the command again to go on from there"
    )))
}

/// Why an attempt ended early: only the network is worth another one.
enum Broken {
    Network(String),
    Disk(ModelError),
}

/// Fetches what is missing of `part`.
fn attempt(
    agent: &ureq::Agent,
    url: &str,
    part: &Path,
    progress: Progress<'_>,
) -> std::result::Result<(), Broken> {
    let on_disk = |action| move |e| Broken::Disk(disk(part, action, e));
    let mut have = fs::metadata(part).map_or(0, |m| m.len());
    let mut request = agent.get(url);
    if have > 0 {
        request = request.set("Range", &format!("bytes={have}-"));
    }
    let response = match request.call() {
        Ok(response) => response,
        // Nothing beyond what is there: complete, or longer than it should be. The checksum tells.
        Err(ureq::Error::Status(416, _)) if have > 0 => return Ok(()),
        Err(e) => return Err(Broken::Network(e.to_string())),
    };
    let begins_here = response
        .header("Content-Range")
        .is_some_and(|r| r.trim().starts_with(&format!("bytes {have}-")));
    if !(response.status() == 206 && begins_here) {
        // The server does not resume: begin again.
        have = 0;
    }
    let length = response.header("Content-Length").and_then(|l| l.parse::<u64>().ok());
    let total = length.and_then(|l| l.checked_add(have));
    let mut file =
        OpenOptions::new().create(true).append(true).open(part).map_err(on_disk("write"))?;
    file.set_len(have).map_err(on_disk("write"))?;
    progress(have, total);
    let mut body = response.into_reader();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Broken::Network(e.to_string())),
        };
        file.write_all(&buffer[..n]).map_err(on_disk("write"))?;
        have += n as u64;
        progress(have, total);
    }
    match total {
        Some(total) if have < total => {
            Err(Broken::Network(format!("{have} of {total} bytes came")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    use super::*;

    /// Serves `body` once per entry of `cuts`: honours Range, and closes the connection after
    /// that many bytes of the answer's body. Returns the address.
    fn server(body: Vec<u8>, cuts: Vec<usize>, resumes: bool) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/file", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for cut in cuts {
                let (mut stream, _) = listener.accept().unwrap();
                let mut from = 0;
                for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                    let line = line.unwrap().to_lowercase();
                    if let Some(range) = line.strip_prefix("range: bytes=") {
                        from = range.trim_end_matches('-').parse().unwrap();
                    }
                    if line.is_empty() {
                        break;
                    }
                }
                let head = if resumes && from > 0 {
                    let (end, all) = (body.len() - 1, body.len());
                    format!("206 Partial Content\r\nContent-Range: bytes {from}-{end}/{all}")
                } else {
                    from = 0;
                    "200 OK".to_owned()
                };
                let rest = &body[from..];
                write!(
                    stream,
                    "HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    rest.len()
                )
                .unwrap();
                stream.write_all(&rest[..cut.min(rest.len())]).unwrap();
            }
        });
        address
    }

    fn body() -> (Vec<u8>, String) {
        let body: Vec<u8> = (0..200_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, &body).unwrap();
        let sum = file_sha256(&path).unwrap();
        (body, sum)
    }

    #[test]
    fn a_broken_download_goes_on_where_it_stopped() {
        for resumes in [true, false] {
            let (body, sum) = body();
            let url = server(body.clone(), vec![70_000, usize::MAX], resumes);
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("model");
            let starts = RefCell::new(Vec::new());
            let last = RefCell::new((0, None));
            download(&url, &target, &sum, &|done, total| {
                if done < last.borrow().0 || last.borrow().1.is_none() || total != last.borrow().1 {
                    starts.borrow_mut().push(done);
                }
                *last.borrow_mut() = (done, total);
            })
            .unwrap();
            assert_eq!(fs::read(&target).unwrap(), body);
            assert_eq!(*last.borrow(), (200_000, Some(200_000)));
            let again = if resumes { vec![0] } else { vec![0, 0] };
            assert_eq!(*starts.borrow(), again, "resumes: {resumes}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn wrong_content_leaves_nothing_behind() {
        let (body, _) = body();
        let url = server(body, vec![usize::MAX], true);
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        let error = download(&url, &target, &"0".repeat(64), &|_, _| {}).unwrap_err();
        assert!(error.to_string().contains("sha256"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_connection_that_keeps_breaking_keeps_what_came() {
        let (body, sum) = body();
        let url = server(body, vec![10, 10, 10], true);
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        let error = download(&url, &target, &sum, &|_, _| {}).unwrap_err();
        assert!(error.to_string().contains("again"), "{error}");
        assert!(!target.exists());
        let part = dir.path().join("model.part");
        assert_eq!(fs::metadata(part).unwrap().len(), 30);
    }
}
