//! The signal that stops a container.

use oci_spec::image::ImageConfiguration;
use podvisor_proto::cri;

/// Signal number that stops the container: the pod's, the image's, SIGTERM.
pub fn stop(config: &cri::ContainerConfig, image: &ImageConfiguration) -> u32 {
    const SIGTERM: u32 = 15;
    let of_image = image
        .config()
        .as_ref()
        .and_then(|config| config.stop_signal().clone());
    let name = match config.stop_signal() {
        cri::Signal::RuntimeDefault => of_image.unwrap_or_default(),
        named => named.as_str_name().trim_start_matches("SIGNAL_").to_owned(),
    };
    signal_number(&name).unwrap_or(SIGTERM)
}

/// The CRI's name of a signal number.
pub fn named(number: u32) -> cri::Signal {
    let mut names =
        (1..=cri::Signal::Sigrtmax as i32).filter_map(|value| cri::Signal::try_from(value).ok());
    names
        .find(|name| {
            signal_number(name.as_str_name().trim_start_matches("SIGNAL_")) == Some(number)
        })
        .unwrap_or_default()
}

/// "SIGUSR1", "USR1", "10" or "SIGRTMIN+3".
fn signal_number(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = name.trim_start_matches("SIG");
    let offset = |text: &str| text.trim_start_matches(['+', '-']).parse::<u32>().ok();
    // The kernel's numbers as the C library exports them: it keeps the first two for itself.
    if let Some(rest) = name.strip_prefix("RTMIN") {
        let rest = rest.strip_prefix("PLUS").unwrap_or(rest);
        return Some(34 + if rest.is_empty() { 0 } else { offset(rest)? });
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        let rest = rest.strip_prefix("MINUS").unwrap_or(rest);
        return 64u32.checked_sub(if rest.is_empty() { 0 } else { offset(rest)? });
    }
    let name = match name {
        "IOT" => "ABRT",
        "CLD" => "CHLD",
        "POLL" => "IO",
        other => other,
    };
    format!("SIG{name}")
        .parse::<nix::sys::signal::Signal>()
        .ok()
        .map(|signal| signal as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::image;

    #[test]
    fn signals_have_many_names() {
        for (name, number) in [
            ("SIGTERM", 15),
            ("QUIT", 3),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("SIGRTMINPLUS3", 37),
            ("SIGRTMAXMINUS1", 63),
            ("SIGCLD", 17),
        ] {
            assert_eq!(signal_number(name), Some(number), "{name}");
        }
        assert_eq!(signal_number("SIGNONE"), None);
        assert_eq!(signal_number("0"), None);
        let mut config = cri::ContainerConfig::default();
        assert_eq!(stop(&config, &image()), 10);
        config.set_stop_signal(cri::Signal::Sigquit);
        assert_eq!(stop(&config, &image()), 3);
    }

    #[test]
    fn every_cri_signal_has_a_number() {
        for value in 1..=65 {
            let signal = cri::Signal::try_from(value).unwrap();
            let name = signal.as_str_name().trim_start_matches("SIGNAL_");
            let number = signal_number(name);
            assert!(number.is_some(), "{name}");
            assert_eq!(
                signal_number(
                    named(number.unwrap())
                        .as_str_name()
                        .trim_start_matches("SIGNAL_")
                ),
                number
            );
        }
    }
}
