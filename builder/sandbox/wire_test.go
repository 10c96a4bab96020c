package sandbox

import (
	"errors"
	"reflect"
	"syscall"
	"testing"
)

// fill gives every field another value than zero, so that one that is forgotten is seen.
func fill(v reflect.Value, n *int64) {
	*n++
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), n)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			fill(v.Index(i), n)
		}
	case reflect.String:
		v.SetString("\xff\x00" + string(rune('a'+*n%26)))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(-*n)
	case reflect.Uint8, reflect.Uint32, reflect.Uintptr:
		v.SetUint(uint64(*n))
	}
}

// TestWire sends all that filo and its children say to each other, with every field set and with none.
func TestWire(t *testing.T) {
	for _, example := range []any{handover{}, report{}, Ground{}} {
		for _, full := range []bool{false, true} {
			in, n := reflect.New(reflect.TypeOf(example)), int64(0)
			if full {
				fill(in.Elem(), &n)
			}
			b := encode(nil, in)
			out := reflect.New(in.Elem().Type())
			rest, err := decode(b, out)
			if err != nil || len(rest) != 0 || !reflect.DeepEqual(in.Interface(), out.Interface()) {
				if full || err != nil || len(rest) != 0 || !reflect.DeepEqual(encode(nil, out), b) { // nil and empty bytes are one
					t.Errorf("%T: got %+v, %d bytes left, %v, want %+v", example, out.Interface(), len(rest), err, in.Interface())
				}
			}
			for i := range b {
				if _, err := decode(b[:i], reflect.New(in.Elem().Type())); err == nil {
					t.Errorf("%T cut to %d of %d bytes: no error", example, i, len(b))
				}
			}
		}
	}
}

func TestReport(t *testing.T) {
	f := report{Step: "mount /x", Text: "no such file", Errno: syscall.ENOENT}
	if err := f.error(nil); !errors.Is(err, syscall.ENOENT) || err.Error() != "set up sandbox: mount /x: no such file" {
		t.Errorf("got %v", err)
	}
}
