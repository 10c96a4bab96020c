# Everything needs Go and its module proxy, nothing else.
GO       ?= go
FUZZTIME ?= 20s
# Checked at these versions; they come from the module proxy.
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# filo is static, and what is tested is what ships.
export CGO_ENABLED = 0

.PHONY: build test check demo bench fuzz clean

# The static binary ./filo.
build:
	$(GO) build -trimpath -ldflags='-s -w' -o filo ./cmd/filo

test:
	$(GO) test -timeout 20m ./... ./testdata/toybox

# Format, vet (also with 32 bits), the doors of the house, and a linter.
check:
	@test -z "$$(gofmt -l .)" || { gofmt -l . && echo "run gofmt -w on these" && false; }
	$(GO) vet ./... ./testdata/toybox
	GOARCH=386 $(GO) vet ./... ./testdata/toybox
	$(GO) test -run 'TestTopLevel|TestFloors|TestPowers|TestGoroutines|TestPackageDocs|TestExportedDocs|TestDoors' ./cmd/filo
	$(GO) run $(STATICCHECK) ./... ./testdata/toybox

# Builds a multi-stage Dockerfile on a base image that ships with the project, twice.
demo: build
	@GO='$(GO)' testdata/demo/run.sh

# filo and every builder found installed on the same work, then the inner loops. BENCHFLAGS='-scale 1 -rounds 5' is all of it.
bench:
	$(GO) run ./testdata/bench $(BENCHFLAGS)
	$(GO) test -run '^$$' -bench . -benchmem ./...

# Every fuzz target of every package, for FUZZTIME each.
fuzz:
	@for pkg in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
			echo "== $$pkg $$target" && $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$pkg || exit 1; \
		done; \
	done

clean:
	@# files of a rootless build may belong to ids that only filo's user namespace can touch
	@[ ! -x filo ] || [ ! -e .demo/state ] || ./filo prune --all --root .demo/state >/dev/null || true
	rm -rf filo bin .demo
