package sandbox

import (
	"encoding/binary"
	"errors"
	"io"
	"math"
	"reflect"

	"golang.org/x/sys/unix"
)

// What goes through sockets and pipes between filo and its children is written by encode and read by decode, which the same
// program does. It is no package of the library's: those that take any string initialize, and compile types, for longer
// than the rest of a child's life.

// send writes what v points to as one message, its length first.
func send(w io.Writer, v any) error {
	const size = 8
	b := encode(make([]byte, size), reflect.ValueOf(v))
	binary.NativeEndian.PutUint64(b, uint64(len(b)-size))
	_, err := w.Write(b)
	return err
}

// receive reads a message into what v points to. At the end of all it is io.EOF.
func receive(r io.Reader, v any) error {
	var size [8]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return err
	}
	b := make([]byte, binary.NativeEndian.Uint64(size[:]))
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	_, err := decode(b, reflect.ValueOf(v))
	return err
}

// fd is an open file that Go's poller knows nothing of.
type fd int

// Read is read(2).
func (f fd) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(f), b)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, err
		case n == 0 && len(b) > 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// Write is write(2), of all of b.
func (f fd) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := unix.Write(int(f), b[done:])
		if err != nil && err != unix.EINTR {
			return done, err
		}
		done += max(n, 0)
	}
	return done, nil
}

// encode appends a value to b: its fields, or elements after their number, one after the other. Interfaces and functions
// are left out.
func encode(b []byte, v reflect.Value) []byte {
	switch v.Kind() {
	case reflect.Pointer:
		return encode(b, v.Elem())
	case reflect.Struct:
		for i := range v.NumField() {
			b = encode(b, v.Field(i))
		}
	case reflect.Slice:
		b = binary.AppendUvarint(b, uint64(v.Len()))
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return append(b, v.Bytes()...)
		}
		for i := range v.Len() {
			b = encode(b, v.Index(i))
		}
	case reflect.String:
		b = binary.AppendUvarint(b, uint64(v.Len()))
		b = append(b, v.String()...)
	case reflect.Bool:
		if v.Bool() {
			return append(b, 1)
		}
		return append(b, 0)
	case reflect.Int, reflect.Int64:
		b = binary.AppendVarint(b, v.Int())
	case reflect.Uint32, reflect.Uintptr:
		b = binary.AppendUvarint(b, v.Uint())
	case reflect.Interface, reflect.Func:
	default:
		panic("encode " + v.Type().String()) // no such field is in what we send
	}
	return b
}

var errShort = errors.New("the message is cut short")

// decode reads what encode wrote into the value that v can set, and returns the rest of b.
func decode(b []byte, v reflect.Value) ([]byte, error) {
	var err error
	switch v.Kind() {
	case reflect.Pointer:
		return decode(b, v.Elem())
	case reflect.Struct:
		for i := 0; i < v.NumField() && err == nil; i++ {
			b, err = decode(b, v.Field(i))
		}
		return b, err
	case reflect.Slice, reflect.String:
		return decodeList(b, v)
	case reflect.Bool:
		if len(b) == 0 {
			return nil, errShort
		}
		v.SetBool(b[0] == 1)
		return b[1:], nil
	case reflect.Int, reflect.Int64:
		x, n := binary.Varint(b)
		if n <= 0 {
			return nil, errShort
		}
		v.SetInt(x)
		return b[n:], nil
	case reflect.Uint32, reflect.Uintptr:
		x, n := binary.Uvarint(b)
		if n <= 0 {
			return nil, errShort
		}
		v.SetUint(x)
		return b[n:], nil
	}
	return b, nil
}

func decodeList(b []byte, v reflect.Value) ([]byte, error) {
	x, n := binary.Uvarint(b)
	if n <= 0 || x > math.MaxInt32 || int(x) > len(b)-n { // no element is shorter than a byte
		return nil, errShort
	}
	b, n = b[n:], int(x)
	switch {
	case v.Kind() == reflect.String:
		v.SetString(string(b[:n]))
		return b[n:], nil
	case v.Type().Elem().Kind() == reflect.Uint8:
		v.SetBytes(b[:n:n])
		return b[n:], nil
	case n == 0:
		return b, nil
	}
	v.Set(reflect.MakeSlice(v.Type(), n, n))
	var err error
	for i := 0; i < n && err == nil; i++ {
		b, err = decode(b, v.Index(i))
	}
	return b, err
}
