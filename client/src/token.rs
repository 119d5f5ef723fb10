//! Where a session gets its token from. Asked by the session's task before each login.
//!
//! Trap: a token ends. A session whose token is a fixed string ends with it; one that is to live longer takes a file that
//! somebody renews, or a function.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

/// What a session proves itself with.
#[derive(Clone, Default)]
pub struct Token(Source);

#[derive(Clone, Default)]
enum Source {
    #[default]
    None,
    Fixed(Arc<str>),
    File(PathBuf),
    Function(Arc<Function>),
}

type Asked = Pin<Box<dyn Future<Output = Result<String, BoxError>> + Send>>;
type Function = dyn Fn() -> Asked + Send + Sync;
type BoxError = Box<dyn Error + Send + Sync>;

/// Why there is no token now.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token in {}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The function gave none.
    #[error("no token: {0}")]
    Function(BoxError),
}

impl Token {
    /// A development login: a name, no proof.
    pub fn none() -> Self {
        Token::default()
    }

    /// Always this one.
    pub fn fixed(token: impl Into<Arc<str>>) -> Self {
        Token(Source::Fixed(token.into()))
    }

    /// Read from this file at each login, without the white space around it. One that has expired is read again for
    /// [`Options::token_wait_ms_max`](crate::Options::token_wait_ms_max); so is a function asked.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Token(Source::File(path.into()))
    }

    /// Asked at each login. It must not block for long; an error is no end, the session tries again later.
    pub fn from_fn<E: Into<BoxError> + Send + 'static>(
        ask: impl Fn() -> Result<String, E> + Send + Sync + 'static,
    ) -> Self {
        Token::from_async(move || std::future::ready(ask()))
    }

    /// The same for a function that waits for somebody, for [`Options::login_ms_max`](crate::Options::login_ms_max) at most.
    pub fn from_async<E, F>(ask: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        E: Into<BoxError> + 'static,
        F: Future<Output = Result<String, E>> + Send + 'static,
    {
        Token(Source::Function(Arc::new(move || {
            let asked = ask();
            Box::pin(async move { asked.await.map_err(Into::into) })
        })))
    }

    /// Whether there may be another one later.
    pub(crate) fn may_change(&self) -> bool {
        matches!(self.0, Source::File(_) | Source::Function(_))
    }

    /// The token of now; empty for a development login.
    pub async fn get(&self) -> Result<String, TokenError> {
        match &self.0 {
            Source::None => Ok(String::new()),
            Source::Fixed(token) => Ok(token.to_string()),
            Source::File(path) => match tokio::fs::read_to_string(path).await {
                Ok(text) => Ok(text.trim().to_owned()),
                Err(error) => Err(TokenError::File { path: path.clone(), error }),
            },
            Source::Function(ask) => ask().await.map_err(TokenError::Function),
        }
    }
}

/// Never with the token itself.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Source::None => f.write_str("Token::none"),
            Source::Fixed(_) => f.write_str("Token::fixed(…)"),
            Source::File(path) => write!(f, "Token::file({path:?})"),
            Source::Function(_) => f.write_str("Token::from_fn(…)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_is_asked_for_each_time_and_never_shown() {
        assert_eq!(Token::none().get().await.unwrap(), "");
        assert_eq!(Token::fixed("x.y.z").get().await.unwrap(), "x.y.z");
        assert!(!format!("{:?}", Token::fixed("x.y.z")).contains("x.y"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = Token::file(&path);
        assert!(token.get().await.unwrap_err().to_string().contains("cannot read the token"));
        for text in ["one", "two"] {
            std::fs::write(&path, format!("{text}\n")).unwrap();
            assert_eq!(token.get().await.unwrap(), text);
        }
        let count = std::sync::atomic::AtomicU32::new(0);
        let token = Token::from_fn(move || match count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            0 => Err("not yet"),
            n => Ok(n.to_string()),
        });
        assert_eq!(token.get().await.unwrap_err().to_string(), "no token: not yet");
        assert_eq!((token.get().await.unwrap(), token.get().await.unwrap()), ("1".into(), "2".into()));
        let token = Token::from_async(|| async { Ok::<_, std::io::Error>("later".to_owned()) });
        assert_eq!(token.get().await.unwrap(), "later");
    }
}
