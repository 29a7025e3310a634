"""Asks about a picture with stubs that grpcio-tools generated from proto/. See python_client.sh."""

import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lockstep.v1 import inference_pb2 as pb
from lockstep.v1 import inference_pb2_grpc

DEADLINE_S = 120


def main(server: str, picture: str, question: str = "What is this?", expected: str = "") -> None:
    channel = grpc.insecure_channel(server)
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    print("health:", health_pb2.HealthCheckResponse.ServingStatus.Name(health.status))
    if health.status != health_pb2.HealthCheckResponse.SERVING:
        raise SystemExit("the server does not serve")

    service = inference_pb2_grpc.InferenceServiceStub(channel)
    model = service.GetModel(pb.GetModelRequest(), timeout=DEADLINE_S)
    print(f"model: {model.name} ({model.architecture}, {model.dtype} on {model.device}, {model.world_size} ranks)")

    chat = pb.Chat(
        messages=[
            pb.Message(
                role=pb.ROLE_USER,
                parts=[
                    pb.Part(image=pb.Image(data=Path(picture).read_bytes(), max_pixels=200_000)),
                    pb.Part(text=question),
                ],
            )
        ]
    )
    cost = service.CountTokens(pb.CountTokensRequest(chat=chat), timeout=DEADLINE_S)
    print(f"cost: {cost.prompt_tokens} tokens, of them {cost.media[0].tokens} for the picture")

    request = pb.GenerateRequest(
        chat=chat,
        sampling=pb.Sampling(temperature=0.0),
        stopping=pb.Stopping(max_tokens=16, ignore_eos=True),
        logprobs=2,
    )
    streamed, text, ended = [], "", None
    for event in service.StreamGenerate(pb.StreamGenerateRequest(request=request), timeout=DEADLINE_S):
        match event.WhichOneof("event"):
            case "started":
                prompt_tokens = event.started.prompt_tokens
            case "delta":
                streamed += event.delta.token_ids
                text += event.delta.text
            case "finished":
                ended = pb.FinishReason.Name(event.finished.reason)
            case "completed":
                print(f"streamed: {text!r}, {ended}, {event.completed.timings.total_ms:.1f} ms")
    answer = service.Generate(request, timeout=DEADLINE_S)
    whole = list(answer.choices[0].token_ids)
    print(f"whole: {answer.choices[0].text!r}")
    if prompt_tokens != cost.prompt_tokens:
        raise SystemExit(f"the prompt has {prompt_tokens} tokens, but {cost.prompt_tokens} were announced")
    if len(whole) != 16 or streamed != whole or text != answer.choices[0].text:
        raise SystemExit(f"streamed {streamed}, but the whole answer is {whole}")
    if len(answer.choices[0].logprobs) != 16 or any(len(at.top) != 2 for at in answer.choices[0].logprobs):
        raise SystemExit("log-probabilities are missing")
    if expected:
        request = pb.GenerateRequest(chat=chat, stopping=pb.Stopping(max_tokens=80))
        text = service.Generate(request, timeout=DEADLINE_S).choices[0].text
        print(f"{question} {text!r}")
        if text != expected:
            raise SystemExit(f"the right answer is {expected!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
