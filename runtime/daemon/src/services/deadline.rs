//! A caller's deadline (gRPC over HTTP/2, `grpc-timeout`): who passes it is told DEADLINE_EXCEEDED.
//!
//! tonic ends such a call too, but with CANCELLED, and a caller that hears of it before its own clock strikes takes
//! that for the answer. So this comes a moment earlier.

use std::time::Duration;

use http::Request;
use tonic::Status;

use super::around::{Answer, Wrap};

/// How much earlier: this part of the deadline, at most so long.
const MARGIN_PART: u32 = 8;
const MARGIN: Duration = Duration::from_millis(20);

/// Ends calls at their deadline.
#[derive(Debug, Clone, Copy)]
pub struct Deadline;

impl Wrap for Deadline {
    fn wrap<B, E: 'static>(
        &self,
        request: &Request<B>,
    ) -> impl FnOnce(Answer<E>) -> Answer<E> + use<B, E> {
        let header = request.headers().get("grpc-timeout");
        let deadline = header.and_then(|value| parse(value.to_str().ok()?));
        move |answer| {
            let Some(deadline) = deadline else {
                return answer;
            };
            let margin = MARGIN.min(deadline / MARGIN_PART);
            Box::pin(async move {
                let answered = tokio::time::timeout(deadline.saturating_sub(margin), answer).await;
                answered.unwrap_or_else(|_| {
                    let problem = format!("not done within the caller's {deadline:?}");
                    Ok(Status::deadline_exceeded(problem).into_http())
                })
            })
        }
    }
}

/// At most eight digits and a unit (gRPC over HTTP/2, "Timeout").
fn parse(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let amount: u64 = (digits.len() <= 8).then(|| digits.parse().ok())??;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use http::Response;
    use tonic::body::Body;
    use tower::{Layer, Service};

    use super::*;
    use crate::services::around::Around;

    #[test]
    fn timeouts_have_units() {
        assert_eq!(parse("5m"), Some(Duration::from_millis(5)));
        assert_eq!(parse("99999999H"), Some(Duration::from_hours(99_999_999)));
        for bad in ["", "m", "5", "5x", "123456789S", "-1S", "5\u{b5}"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn a_deadline_that_passes_is_told_as_such() {
        let pending = tower::service_fn(|_: Request<()>| {
            std::future::pending::<Result<Response<Body>, std::convert::Infallible>>()
        });
        let request = Request::builder()
            .header("grpc-timeout", "1m")
            .body(())
            .unwrap();
        let answer = Around(Deadline).layer(pending).call(request).await.unwrap();
        assert_eq!(answer.headers()["grpc-status"], "4");
    }
}
