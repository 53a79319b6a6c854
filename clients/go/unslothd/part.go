package unslothd

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

// part is a file that is being received: NAME.part until all of it is here and its hash is right.
type part struct {
	root     *os.Root
	file     *pb.ArtifactFile
	stream   *os.File
	hash     hash.Hash
	numBytes int64 // that are here
}

func partName(name string) string { return name + ".part" }

// partBytes returns how many bytes of an unfinished file are here.
func partBytes(root *os.Root, name string) int64 {
	info, err := root.Lstat(partName(name))
	if err != nil || !info.Mode().IsRegular() {
		return 0
	}
	return info.Size()
}

// openPart goes on with an unfinished file, or begins it. The os.Root keeps every name inside the folder, through links
// as well.
func openPart(root *os.Root, file *pb.ArtifactFile) (*part, error) {
	if err := root.MkdirAll(path.Dir(file.GetName()), 0o777); err != nil {
		return nil, err
	}
	stream, err := root.OpenFile(partName(file.GetName()), os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	p := &part{root: root, file: file, stream: stream, hash: sha256.New()}
	if p.numBytes, err = io.Copy(p.hash, stream); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *part) complete() bool { return p.numBytes >= p.file.GetNumBytes() }

func (p *part) receive(chunk []byte) error {
	written, err := p.stream.Write(chunk)
	p.hash.Write(chunk[:written])
	p.numBytes += int64(written)
	return err
}

// finish gives the file its name; errStale, and its bytes are dropped, when they are not the server's.
func (p *part) finish() error {
	name := p.file.GetName()
	if p.numBytes != p.file.GetNumBytes() || hex.EncodeToString(p.hash.Sum(nil)) != p.file.GetSha256() {
		p.close()
		return errors.Join(errStale, p.root.Remove(partName(name)))
	}
	if err := errors.Join(p.stream.Sync(), p.stream.Close()); err != nil {
		return err
	}
	return p.root.Rename(partName(name), name)
}

// close leaves what is here for the next time.
func (p *part) close() { _ = p.stream.Close() }

// hashed returns the SHA-256 of a file as hexadecimal digits, and its size.
func hashed(root *os.Root, name string) (string, int64, error) {
	file, err := root.Open(name)
	if err != nil {
		return "", 0, err
	}
	defer file.Close()
	hash := sha256.New()
	size, err := io.Copy(hash, file)
	return hex.EncodeToString(hash.Sum(nil)), size, err
}

// staysInside is true for a name that is a plain path below any folder, on every system.
func staysInside(name string) bool {
	return name == path.Clean(name) && filepath.IsLocal(name) && name != "." && !strings.ContainsAny(name, "\\:\x00")
}
