package sandbox

import (
	"os"
	"testing"
)

// BenchmarkRunTrue is what a step costs that does nothing.
func BenchmarkRunTrue(b *testing.B) {
	box := newBox(b)
	p := box.process("exit", "0")
	for b.Loop() {
		if err := run(b.Context(), p); err != nil {
			b.Fatal(err)
		}
		os.RemoveAll(box.root.Work + "/work")
	}
}
