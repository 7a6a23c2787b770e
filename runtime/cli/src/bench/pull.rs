//! Pull and unpack of one image, against another CRI runtime on the same machine in the same run.

use std::time::{Duration, Instant};

use podvisor_proto::cri;

use super::stats::{Samples, Unit};
use crate::client::{self, ClientError, Daemon};

/// Name of ours.
pub const PODVISOR: &str = "podvisor";
/// Name of the other one.
pub const OTHER: &str = "other runtime";

/// What one pull may take.
const PULL: Duration = Duration::from_mins(10);

/// Pulls `image` `rounds` times with each runtime, by turns so that what else the machine does
/// meets all of them, and cold: the image is removed and the disk is quiet before each.
pub async fn compare(
    runtimes: &[(&str, &Daemon)],
    image: &str,
    rounds: usize,
    mut done: impl FnMut(usize),
) -> anyhow::Result<Samples> {
    let mut samples = Samples::default();
    for round in 0..rounds {
        for &(name, daemon) in runtimes {
            remove(daemon, image).await?;
            // What the last pull has left to be written must not slow this one down.
            tokio::task::spawn_blocking(nix::unistd::sync).await?;
            let begin = Instant::now();
            pull(daemon, image).await?;
            let elapsed = begin.elapsed().as_secs_f64() * 1e3;
            samples.add(metric(name), Unit::Milliseconds, elapsed);
        }
        done(round + 1);
    }
    for (_, daemon) in runtimes {
        remove(daemon, image).await?;
    }
    Ok(samples)
}

/// The metric of a runtime's pulls.
pub fn metric(runtime: &str) -> String {
    format!("pull/{runtime}")
}

fn spec(image: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    }
}

async fn pull(daemon: &Daemon, image: &str) -> Result<(), ClientError> {
    let request = cri::PullImageRequest {
        image: Some(spec(image)),
        ..Default::default()
    };
    let mut images = daemon.images.clone();
    images
        .pull_image(client::within(PULL, request))
        .await
        .map(drop)
        .map_err(client::failed("PullImage"))
}

async fn remove(daemon: &Daemon, image: &str) -> Result<(), ClientError> {
    let request = cri::RemoveImageRequest {
        image: Some(spec(image)),
    };
    let mut images = daemon.images.clone();
    images
        .remove_image(client::within(client::CALL, request))
        .await
        .map(drop)
        .map_err(client::failed("RemoveImage"))
}
