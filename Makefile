# Environments: .venv holds what serving needs, .venv-dev all of it (torch included); .venv-gpu and
# .venv-gpu-dev are the same with onnxruntime-gpu, which excludes onnxruntime. Where pip finds only torch
# with CUDA, TORCH_INDEX=https://download.pytorch.org/whl/cpu spares .venv-dev some gigabytes.

PORT ?= $(or $(VIGNETTE_PORT),8000)
ENGINE ?= $(or $(VIGNETTE_ENGINE),engines/demo)
NAME ?=
IMAGE ?= demo/samples/owl.png
IMAGES ?= demo/samples
OUTPUT ?= captions.jsonl
PYTHON ?= python3
TARGET ?= gpu
DEVICE ?= cpu
DATA ?=
WHEELS ?=
TORCH_INDEX ?=

# Recipes read these from their environment, whatever is in them: blanks, quotes, dollars.
export PORT ENGINE MODEL NAME IMAGE IMAGES OUTPUT URL DEVICE DATA
export TOKENIZERS_PARALLELISM = false
export ORT_DISABLE_TELEMETRY = 1

GPU = $(if $(filter cuda tensorrt,$(DEVICE)),-gpu)
SERVE = .venv$(GPU)/bin/python
SERVE_READY = .venv$(GPU)/ready$(if $(filter tensorrt,$(DEVICE)),-tensorrt)
BULK_READY = .venv$(GPU)/ready-bulk
DEV = .venv-dev/bin/python
GPU_DEV = .venv-gpu-dev/bin/python
BENCH = $(DEV) -m vignette bench $(if $(QUICK),--quick)
CALLED = make $@$(if $(QUICK), QUICK=1)$(if $(ARGS), ARGS="$(ARGS)")
PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
  $(if $(WHEELS),--no-index --find-links $(WHEELS)) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help serve caption export tune check_export evaluate demo-model demo-engine \
  baseline benchmark batch_performance build run_docker test_container \
  test kills clients lint format stubs test_server gpu-check chaos soak siege clean

help:  ## list the targets
	@grep -hE '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

serve: $(SERVE_READY)  ## start the server (PORT=8000 ENGINE=engines/demo ARGS=...; DEVICE=cuda)
	@$(SERVE) -P -m vignette serve --engine "$$ENGINE" --port "$$PORT" $(if $(GPU),--provider $(DEVICE)) $(ARGS)

caption: $(SERVE_READY) $(BULK_READY)  ## caption images in bulk (IMAGES, OUTPUT, ENGINE or URL, ARGS; DEVICE)
	@$(SERVE) -P -m vignette caption "$$IMAGES" --output "$$OUTPUT" $(if $(URL),--url "$$URL",--engine "$$ENGINE") \
	  $(if $(GPU),--provider $(DEVICE)) $(ARGS)

test_server:  ## post a sample to a running server (PORT, IMAGE)
	@curl --fail-with-body --silent --show-error --write-out 'total request time=%{time_total}s\n' \
	  --data-binary "@$$IMAGE" "http://localhost:$$PORT/caption"

# For CUDA on a host with a GPU, so that the gate judges fp16 there.
WITH_GPU = $(filter tensorrt,$(TARGET))$(and $(filter cuda,$(TARGET)),$(wildcard /proc/driver/nvidia/version))
EXPORT = $(if $(WITH_GPU),.venv-gpu-dev,.venv-dev)
EXPORT_PYTHON = $(EXPORT)/bin/python
ifneq ($(filter export,$(MAKECMDGOALS)),)  # told before anything is installed
$(if $(MODEL),,$(error say which: make export MODEL=microsoft/git-base-textcaps))
$(if $(and $(filter command line,$(origin TARGET)),$(filter-out cuda tensorrt,$(TARGET))),$(error \
  TARGET is cuda or tensorrt; leave it out for processors))
endif
export: $(EXPORT)/ready$(if $(filter tensorrt,$(TARGET)),-tensorrt)  ## MODEL=<hub id or folder> to engines/<name> (NAME, ARGS; TARGET=cuda, tensorrt)
	@$(EXPORT_PYTHON) -P -m vignette export "$$MODEL" --output "engines/$${NAME:-$$(basename -- "$$MODEL")}" \
	  $(if $(filter cuda tensorrt,$(TARGET)),--target $(TARGET)) $(ARGS)

tune: .venv/ready  ## measure ENGINE on this machine's processors and write its plan.json
	@.venv/bin/python -P -m vignette tune "$$ENGINE" $(ARGS)

check_export: .venv-dev/ready  ## export git-base at full size with random weights and verify it
	@$(DEV) -m vignette export --random-weights git-base --output engines/random-git-base $(ARGS)

demo-model: .venv-dev/ready  ## train the demo model and export it (about three hours; resumes)
	@$(DEV) -m demo train $(ARGS)
	@$(MAKE) --no-print-directory demo-engine

ABOUT = The demo model knows 112 things, drawn as emoji, up to three of a kind or two side by side, on seven backgrounds. Photographs are beyond it.
demo-engine: .venv-dev/ready  ## rebuild engines/demo from the committed weights and verify it
	@$(DEV) -m demo pictures demo/.cache/pictures
	@$(DEV) -m vignette export demo/model --name vignette-demo --images demo/.cache/pictures \
	  --verify-images 64 --target cuda --output engines/demo --about '$(ABOUT)'

evaluate: .venv-dev/ready  ## score ENGINE on 1,000 held-out scenes; with DATA (references) and IMAGES on yours
	@$(DEV) -m $(if $(DATA),vignette evaluate --data "$$DATA" --images "$$IMAGES",demo evaluate) --engine "$$ENGINE" $(ARGS)

baseline: engines/random-git-base/manifest.json  ## PyTorch servers under ApacheBench (QUICK=1)
	@$(BENCH) --baseline --output bench/runs/baseline --called '$(CALLED)' http $(ARGS)

ifeq ($(DEVICE),cuda)
benchmark: .venv-gpu-dev/ready
	@$(GPU_DEV) -m bench.cuda $(if $(QUICK),--quick --output bench/runs/quick) --called '$(CALLED) DEVICE=cuda' $(ARGS)
else
benchmark: engines/random-git-base/manifest.json  ## PyTorch and Vignette side by side (QUICK=1; DEVICE=cuda)
	@$(BENCH) --output bench/$(if $(QUICK)$(ARGS),runs/quick,results) --called '$(CALLED)' $(ARGS)
endif

gpu-check: .venv-gpu-dev/ready  ## on a GPU host: test and measure all of it (WHEELS=<folder>: offline)
	@$(GPU_DEV) -m pytest -m gpu -rs tests/runtime/test_on_gpu.py
	@$(GPU_DEV) -m bench.cuda --quick --output bench/runs/gpu-check --called 'make gpu-check'

batch_performance: engines/random-git-base/manifest.json  ## time against batch size (QUICK=1)
	@$(BENCH) --output bench/runs/batches --called '$(CALLED)' batches $(ARGS)

engines/random-git-base/manifest.json: $(wildcard export/*.py) | .venv-dev/ready
	@echo 'exporting git-base with random weights first, once for each version of export/'
	@$(DEV) -m vignette export --random-weights git-base --output $(@D) --verify-images 2

build:  ## build the GPU image (TARGET=cpu, export or ray for the others)
	docker build --file docker/Dockerfile --target $(TARGET) --tag vignette:$(TARGET) .

run_docker:  ## run it on all GPUs (PORT, ENGINE, ARGS; TARGET=cpu without a GPU)
	docker run --rm --shm-size 512m --stop-timeout 40 --publish $(PORT):8000 $(if $(filter cpu,$(TARGET)),,--gpus all) \
	  --read-only --tmpfs /tmp --cap-drop=all --security-opt no-new-privileges \
	  --volume "$(CURDIR)/engines:/app/engines:ro" --env VIGNETTE_ENGINE="$$ENGINE" \
	  vignette:$(TARGET) $(ARGS)

test_container:  ## build the CPU image and see it work (docker, or podman and buildah; GPU_IMAGE=1)
	@$(PYTHON) docker/check.py $(if $(GPU_IMAGE),gpu)

chaos: $(if $(QUICK),.venv-dev/ready,engines/random-git-base/manifest.json)  ## kill, stop, overload and fuzz a running server (half an hour; QUICK=1)
	@$(DEV) -m bench.reliability $(if $(QUICK),--short) $(ARGS) --without soak siege $(if $(QUICK),fuzzing dying-cluster large-photographs)

siege: .venv-dev/ready  ## two hours of attacks from 1, 8 and 32 senders beside honest clients
	@$(DEV) -m bench.reliability siege $(ARGS)

soak: .venv-dev/ready  ## an hour of mixed load, good and bad
	@$(DEV) -m bench.reliability soak $(ARGS)

STUBS = server/grpc/stubs
stubs:  ## make the gRPC code again from the .proto files
	@$(PYTHON) -m venv .venv-stubs
	@.venv-stubs/bin/python -m pip install --quiet --disable-pip-version-check grpcio-tools==1.85.1
	@cd $(STUBS) && ../../../.venv-stubs/bin/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. *.proto
	@rm $(STUBS)/model_config_pb2_grpc.py
	@sed -i -E 's/^import (grpc_service|model_config)_pb2/from server.grpc.stubs import \1_pb2/' $(STUBS)/*_pb2*.py

test: .venv-dev/ready  ## run the tests (ARGS goes to pytest)
	@$(DEV) -m pytest $(or $(ARGS),--numprocesses 2 --dist loadfile)

kills: .venv-dev/ready  ## kill bulk runs 50 times for each form of output
	@KILLS=50 $(DEV) -m pytest tests/bulk/test_outputs.py -k killed

clients: .venv-dev/ready  ## kserve's own client and NVIDIA's aiperf, in environments of their own, against a server
	@for client in kserve==0.21.0 aiperf==0.13.0; do $(PYTHON) -m venv .venv-$${client%%=*} && \
	  .venv-$${client%%=*}/bin/python -m pip install --quiet --disable-pip-version-check $$client; done
	@$(DEV) -m tests.clients .venv-kserve .venv-aiperf

lint: .venv-dev/ready  ## ruff and mypy
	@$(DEV) -m ruff check .
	@$(DEV) -m ruff format --check .
	@$(DEV) -m mypy

format: .venv-dev/ready  ## let ruff put the code in order
	@$(DEV) -m ruff check --fix .
	@$(DEV) -m ruff format .

clean:  ## remove all environments
	rm -rf .venv .venv-stubs .venv-kserve .venv-aiperf .venv-dev .venv-gpu .venv-gpu-dev

.venv/ready: EXTRAS = cpu,grpc
.venv/ready-bulk: EXTRAS = cpu,grpc,bulk
.venv-dev/ready: EXTRAS = cpu,grpc,video,bulk,ray,export,bench,quality,dev,otel

.venv-gpu/ready: EXTRAS = gpu,grpc
.venv-gpu/ready-bulk: EXTRAS = gpu,grpc,bulk
.venv-gpu/ready-tensorrt: EXTRAS = gpu,grpc,tensorrt
.venv-gpu-dev/ready: EXTRAS = gpu,grpc,bulk,export,bench,dev,otel
.venv-gpu-dev/ready-tensorrt: EXTRAS = gpu,grpc,bulk,export,bench,dev,otel,tensorrt

.venv/ready .venv/ready-bulk .venv-gpu/ready-bulk .venv-dev/ready $(foreach env,.venv-gpu .venv-gpu-dev,$(env)/ready $(env)/ready-tensorrt): \
  pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.11'; exit 2; }
	@echo 'installing $(EXTRAS) into $(@D) ...'
	@$(PYTHON) -m venv $(VENV_ARGS) $(@D)
	@$(@D)/bin/python $(PIP) --editable '.[$(EXTRAS)]'
	@touch $@
