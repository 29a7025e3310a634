"""Asks about a picture knowing nothing of the API but what server reflection tells. See python_client.sh."""

import base64
import sys
from pathlib import Path

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

DEADLINE_S = 120


class Reflected:
    """A service whose methods are called with, and answer in, plain dictionaries."""

    def __init__(self, channel: grpc.Channel, pool: DescriptorPool, name: str) -> None:
        self.channel = channel
        self.pool = pool
        self.service = pool.FindServiceByName(name)

    def call(self, method: str, request: dict) -> list[dict]:
        """All answers: one for a unary method."""
        described = self.service.methods_by_name[method]
        path = f"/{self.service.full_name}/{method}"
        message = json_format.ParseDict(request, GetMessageClass(described.input_type)(), descriptor_pool=self.pool)
        kind = self.channel.unary_stream if described.server_streaming else self.channel.unary_unary
        send = kind(
            path,
            request_serializer=lambda value: value.SerializeToString(),
            response_deserializer=GetMessageClass(described.output_type).FromString,
        )
        answer = send(message, timeout=DEADLINE_S)
        answers = answer if described.server_streaming else [answer]
        return [
            json_format.MessageToDict(each, preserving_proto_field_name=True, descriptor_pool=self.pool) for each in answers
        ]


def main(server: str, picture: str, question: str = "What is this?", expected: str = "") -> None:
    channel = grpc.insecure_channel(server)
    database = ProtoReflectionDescriptorDatabase(channel)
    names = set(database.get_services())
    print("services:", ", ".join(sorted(names)))
    missing = {"lockstep.v1.InferenceService", "grpc.health.v1.Health"} - names
    if missing:
        raise SystemExit(f"reflection does not list {missing}")
    pool = DescriptorPool(database)

    [health] = Reflected(channel, pool, "grpc.health.v1.Health").call("Check", {})
    print("health:", health.get("status"))
    if health.get("status") != "SERVING":
        raise SystemExit("the server does not serve")
    service = Reflected(channel, pool, "lockstep.v1.InferenceService")
    [model] = service.call("GetModel", {})
    print(f"model: {model['name']}, {model['world_size']} ranks")

    # Dictionaries are converted as JSON is: bytes go in base64.
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    parts = [{"image": {"data": data, "max_pixels": 200_000}}, {"text": question}]
    chat = {"messages": [{"role": "ROLE_USER", "parts": parts}]}
    [cost] = service.call("CountTokens", {"chat": chat})
    print(f"cost: {cost['prompt_tokens']} tokens, of them {cost['media'][0]['tokens']} for the picture")

    request = {
        "chat": chat,
        "sampling": {"temperature": 0.0},
        "stopping": {"max_tokens": 16, "ignore_eos": True},
    }
    events = service.call("StreamGenerate", {"request": request})
    streamed = [token for event in events for token in event.get("delta", {}).get("token_ids", [])]
    text = "".join(event.get("delta", {}).get("text", "") for event in events)
    print("streamed:", repr(text))
    [answer] = service.call("Generate", request)
    whole = answer["choices"][0]["token_ids"]
    print("whole:", repr(answer["choices"][0].get("text", "")))
    if events[0]["started"]["prompt_tokens"] != cost["prompt_tokens"]:
        raise SystemExit("the stream began with another number of prompt tokens than was announced")
    if len(whole) != 16 or streamed != whole:
        raise SystemExit(f"streamed {streamed}, but the whole answer is {whole}")
    if expected:
        [answer] = service.call("Generate", {"chat": chat, "stopping": {"max_tokens": 80}})
        text = answer["choices"][0].get("text", "")
        print(f"{question} {text!r}")
        if text != expected:
            raise SystemExit(f"the right answer is {expected!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
