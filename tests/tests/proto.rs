//! Wire compatibility: proto/cri/v1/cri.proto, field by field, against the upstream definition.

use std::path::Path;

use podvisor_tests::{output_of, repository, rig};
use protox::prost_reflect::{
    DescriptorPool, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor,
};

fn compile(file: &Path) -> DescriptorPool {
    let dir = file.parent().expect("a file is in a directory");
    let set = protox::compile([file], [dir])
        .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    DescriptorPool::from_file_descriptor_set(set).expect("protox checked it")
}

fn ours() -> DescriptorPool {
    compile(&repository().join("proto/cri/v1/cri.proto"))
}

/// Pools of the upstream versions, oldest first.
fn upstream() -> Vec<DescriptorPool> {
    let paths = output_of(&mut rig("cri-api.sh"));
    paths.lines().map(|path| compile(Path::new(path))).collect()
}

/// Messages, nested ones too, but not the entries of maps and not google's.
fn messages(pool: &DescriptorPool) -> impl Iterator<Item = MessageDescriptor> + '_ {
    pool.all_messages()
        .filter(|message| message.package_name() == "runtime.v1" && !message.is_map_entry())
}

fn is_windows(name: &str) -> bool {
    name.to_ascii_lowercase().contains("windows")
}

/// What of a field is seen on the wire and by a reader of JSON: all but its comment.
fn shape(field: &FieldDescriptor) -> String {
    let kind = match field.kind() {
        Kind::Message(message) if message.is_map_entry() => format!(
            "map<{:?}, {}>",
            message.map_entry_key_field().kind(),
            shape(&message.map_entry_value_field())
        ),
        Kind::Message(message) => message.full_name().to_owned(),
        Kind::Enum(choice) => choice.full_name().to_owned(),
        // The newest upstream made this field bytes, so that values need not be UTF-8. On the wire
        // both are the same.
        _ if field.full_name() == "runtime.v1.KeyValue.value" => "string or bytes".into(),
        scalar => format!("{scalar:?}"),
    };
    // Packed or not: parsers take both, but writers differ.
    format!(
        "{} = {}: {kind}, {:?}, packed {}",
        field.name(),
        field.number(),
        field.cardinality(),
        field.is_packed()
    )
}

/// Every message, field, enum value and method of `wanted` is in `given`, the same.
fn assert_contains(given: &DescriptorPool, wanted: &DescriptorPool) {
    let mut wrong = Vec::new();
    for message in messages(wanted).filter(|message| !is_windows(message.full_name())) {
        let Some(own) = given.get_message_by_name(message.full_name()) else {
            wrong.push(format!("no message {}", message.full_name()));
            continue;
        };
        for field in message.fields() {
            compare(&own, &field, &mut wrong);
        }
    }
    for choice in wanted
        .all_enums()
        .filter(|e| e.package_name() == "runtime.v1")
    {
        match given.get_enum_by_name(choice.full_name()) {
            Some(own) => compare_values(&own, &choice, &mut wrong),
            None => wrong.push(format!("no enum {}", choice.full_name())),
        }
    }
    compare_methods(given, wanted, &mut wrong);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn compare(own: &MessageDescriptor, wanted: &FieldDescriptor, wrong: &mut Vec<String>) {
    let name = wanted.full_name();
    let number = wanted.number();
    let windows = match wanted.kind() {
        Kind::Message(message) => is_windows(message.full_name()),
        _ => false,
    };
    match own.get_field(number) {
        None if windows => {
            if !own.reserved_ranges().any(|range| range.contains(&number)) {
                wrong.push(format!("{name}: {number} is not reserved"));
            }
        }
        None => wrong.push(format!("no {name}")),
        Some(field) if shape(&field) != shape(wanted) => {
            wrong.push(format!(
                "{name}: {} is not {}",
                shape(&field),
                shape(wanted)
            ));
        }
        Some(_) => {}
    }
}

fn compare_values(own: &EnumDescriptor, wanted: &EnumDescriptor, wrong: &mut Vec<String>) {
    for value in wanted.values() {
        let name = value.name();
        let found = own.get_value(value.number());
        let same = found.as_ref().is_some_and(|found| {
            // Signal's values had other names until 1.36. Numbers are what travels.
            found.name() == name
                || wanted.name() == "Signal" && found.name() == format!("SIGNAL_{name}")
        });
        if !same {
            wrong.push(format!("{}: {found:?}", value.full_name()));
        }
    }
}

fn compare_methods(given: &DescriptorPool, wanted: &DescriptorPool, wrong: &mut Vec<String>) {
    let methods = |pool: &DescriptorPool| -> Vec<String> {
        pool.services()
            .flat_map(|service| service.methods().collect::<Vec<_>>())
            .map(|m| {
                format!(
                    "{}({} {}) returns ({} {})",
                    m.full_name(),
                    m.is_client_streaming(),
                    m.input().full_name(),
                    m.is_server_streaming(),
                    m.output().full_name()
                )
            })
            .collect()
    };
    let own = methods(given);
    let missing = methods(wanted)
        .into_iter()
        .filter(|method| !own.contains(method));
    wrong.extend(missing.map(|method| format!("no {method}")));
}

#[test]
fn ours_has_all_that_upstream_has() {
    for upstream in upstream() {
        assert_contains(&ours(), &upstream);
    }
}

#[test]
fn ours_has_nothing_of_its_own() {
    let newest = upstream().pop().expect("at least one");
    assert_contains(&newest, &ours());
}

#[test]
fn all_rpcs_are_declared() {
    let count = |name: &str| {
        let service = ours().get_service_by_name(name);
        service.expect("a CRI service").methods().len()
    };
    assert_eq!(count("runtime.v1.RuntimeService"), 37);
    assert_eq!(count("runtime.v1.ImageService"), 6);
}
