//! HdrHistogram interval logs, one file per histogram and one line per second, for the tools that read those. Main thread.
//!
//! Trap: values are microseconds, `Interval_Max` too: a tool that scales to milliseconds wants to be told to divide.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, IntervalLogWriterError};

use crate::engine::{Sample, Times};
use crate::monitor::RunError;

/// The logs of one run.
pub struct HdrLogs {
    logs: Vec<Log>,
    serializer: V2DeflateSerializer,
    began: SystemTime,
}

struct Log {
    path: PathBuf,
    file: BufWriter<File>,
    of: fn(&Sample) -> &Times,
}

impl HdrLogs {
    /// Begins `PREFIX.connect.hlog` and its siblings.
    pub fn create(prefix: &Path) -> Result<HdrLogs, RunError> {
        let began = SystemTime::now();
        let mut logs = Vec::with_capacity(HISTOGRAMS.len());
        for (name, of) in HISTOGRAMS {
            let mut file_name = prefix.as_os_str().to_owned();
            file_name.push(format!(".{name}.hlog"));
            let path = PathBuf::from(file_name);
            let wrong = |error| RunError::Io { what: format!("cannot write {}", path.display()), error };
            let mut file = BufWriter::new(File::create(&path).map_err(wrong)?);
            let mut serializer = V2DeflateSerializer::new();
            IntervalLogWriterBuilder::new()
                .add_comment(&format!("[{name} of a rookery loadtest; values in microseconds]"))
                .add_comment("[Histogram log format version 1.3]")
                .with_start_time(began)
                .with_base_time(began)
                .begin_log_with(&mut file, &mut serializer)
                .map_err(wrong)?;
            writeln!(
                file,
                "\"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\"Interval_Compressed_Histogram\""
            )
            .map_err(wrong)?;
            logs.push(Log { path, file, of });
        }
        Ok(HdrLogs { logs, serializer: V2DeflateSerializer::new(), began })
    }

    /// What happened in the `seconds` that end now. Histograms in which nothing did get no line.
    pub fn write(&mut self, second: &Sample, seconds: f64) -> Result<(), RunError> {
        let end = self.began.elapsed().unwrap_or_default();
        let length = Duration::from_secs_f64(seconds.max(0.0));
        for log in &mut self.logs {
            let times = (log.of)(second);
            if times.is_empty() {
                continue;
            }
            let written = IntervalLogWriterBuilder::new()
                .begin_log_with(&mut log.file, &mut self.serializer)
                .map_err(IntervalLogWriterError::from)
                .and_then(|mut writer| {
                    writer.write_histogram(times, end.saturating_sub(length), length, None)
                })
                .and_then(|()| log.file.flush().map_err(IntervalLogWriterError::from));
            written.map_err(|error| RunError::Io {
                what: format!("cannot write {}", log.path.display()),
                error: std::io::Error::other(error.to_string()),
            })?;
        }
        Ok(())
    }
}

/// Where a log's times come from.
type TimesOf = fn(&Sample) -> &Times;

/// Name of the file, and where it comes from.
const HISTOGRAMS: [(&str, TimesOf); 4] = [
    ("connect", |sample| &sample.connect),
    ("login", |sample| &sample.login),
    ("ping", |sample| &sample.ping),
    ("delivery", |sample| &sample.latency),
];

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    #[test]
    fn what_is_written_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("run");
        let mut logs = HdrLogs::create(&prefix).unwrap();
        let mut sample = Sample::default();
        (1..=1_000).for_each(|us| sample.login.saturating_record(us));
        logs.write(&sample, 1.0).unwrap();
        logs.write(&sample, 1.0).unwrap();
        let text = std::fs::read(folder.path().join("run.login.hlog")).unwrap();
        let mut intervals = 0;
        for entry in IntervalLogIterator::new(&text) {
            if let LogEntry::Interval(interval) = entry.unwrap() {
                intervals += 1;
                let bytes = base64(interval.encoded_histogram());
                let read: hdrhistogram::Histogram<u64> =
                    Deserializer::new().deserialize(&mut &bytes[..]).unwrap();
                assert_eq!((read.len(), read.max()), (1_000, sample.login.max()));
            }
        }
        assert_eq!(intervals, 2);
        let connect = std::fs::read_to_string(folder.path().join("run.connect.hlog")).unwrap();
        assert!(connect.lines().all(|line| line.starts_with('#') || line.starts_with('"')), "{connect}");
    }

    /// The crate that writes base64 is not ours to call.
    fn base64(text: &str) -> Vec<u8> {
        const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let (mut bits, mut count, mut bytes) = (0u32, 0, Vec::new());
        for letter in text.bytes().filter(|letter| *letter != b'=') {
            bits = bits << 6 | LETTERS.iter().position(|l| *l == letter).unwrap() as u32;
            count += 6;
            if count >= 8 {
                count -= 8;
                bytes.push((bits >> count) as u8);
            }
        }
        bytes
    }
}
