package unslothd

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
)

// DownloadProgress is how far a file has come.
type DownloadProgress struct {
	Name     string // below the folder, with "/"
	Done     int64  // bytes of it that are here
	NumBytes int64  // its size
}

// DownloadOptions are what Download can be told. The zero value is fine.
type DownloadOptions struct {
	Overwrite  bool                   // replace files of the same name and other content
	OnProgress func(DownloadProgress) // called whenever more of a file is here
}

// Download fetches files into a folder here, which is made when it does not exist, checks their hashes, and returns
// their paths in the order of their names. The request says what: an artifact, or a training's result or checkpoint; and
// which files, all when it names none.
//
// A file is called NAME.part until it is whole. What is here already is not sent again, and a broken download goes on
// where it stopped, in this call or in the next one. Nothing is written outside of the folder, whatever the server says.
//
// Errors: NotFound; fs.ErrExist for a file of the same name and other content, unless Overwrite; PermissionDenied for a
// name that leads out of the folder; code DataLoss when the bytes do not have the hash that the server told.
func (c *Client) Download(
	ctx context.Context, request *pb.DownloadArtifactRequest, folder string, options DownloadOptions,
) ([]string, error) {
	if err := os.MkdirAll(folder, 0o777); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(folder)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	transfer := &transfer{client: c, ctx: ctx, request: request, root: root, options: options, retry: c.streamRetry()}
	names := slices.Clone(request.GetNames())
	if len(names) == 0 {
		if names, err = transfer.allNames(); err != nil {
			return nil, err
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	paths := make([]string, 0, len(names))
	for _, name := range names {
		if err := transfer.take(name); err != nil {
			return nil, err
		}
		paths = append(paths, filepath.Join(folder, filepath.FromSlash(name)))
	}
	return paths, nil
}

// transfer is a download that is going on.
type transfer struct {
	client  *Client
	ctx     context.Context
	request *pb.DownloadArtifactRequest
	root    *os.Root
	options DownloadOptions
	retry   *retry
}

// errStale says that the bytes which were here before belong to another file: it is taken again from its beginning.
var errStale = errors.New("the part that was here belongs to another file")

func (t *transfer) allNames() ([]string, error) {
	request := t.asking(nil, 0)
	request.HeadersOnly = true
	for {
		names, lost := t.headers(request)
		if lost == nil {
			return names, nil
		}
		if !connectionLost(lost) {
			return nil, lost
		}
		if err := t.retry.wait(t.ctx, lost); err != nil {
			return nil, err
		}
	}
}

func (t *transfer) headers(request *pb.DownloadArtifactRequest) ([]string, *Error) {
	stream := opening(t.ctx, request, t.client.stub.DownloadArtifact)
	defer stream.close()
	var names []string
	for {
		message, err := stream.receive()
		if errors.Is(err, io.EOF) {
			return names, nil
		}
		if err != nil {
			return nil, t.client.translated(t.ctx, err)
		}
		t.retry.heard()
		if file := message.GetFile(); file != nil {
			names = append(names, file.GetName())
		}
	}
}

// take fetches a file, with as many streams as it needs.
func (t *transfer) take(name string) error {
	if !staysInside(name) {
		return localError(codes.PermissionDenied,
			"the server named a file %q, which would not stay inside the folder; nothing was written for it", name)
	}
	for restarted := false; ; {
		offset := partBytes(t.root, name)
		err := t.read(name, offset)
		var failure *Error
		switch {
		case err == nil:
			return nil
		case offset > 0 && !restarted && (errors.Is(err, errStale) || errors.Is(err, OutOfRange)):
			restarted = true
			if err := t.root.Remove(partName(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		case errors.Is(err, errStale):
			return localError(codes.DataLoss, "%s arrived with another sha256 than the server told; the file may have "+
				"changed or be damaged there. Nothing was kept of it: download it again, or export anew", name)
		case errors.As(err, &failure) && connectionLost(failure):
			if err := t.retry.wait(t.ctx, failure); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// read takes from one stream what is not here yet.
func (t *transfer) read(name string, offset int64) error {
	stream := opening(t.ctx, t.asking([]string{name}, offset), t.client.stub.DownloadArtifact)
	defer stream.close()
	message, err := stream.receive()
	if err != nil {
		return t.broken(err)
	}
	file := message.GetFile()
	if file.GetName() != name {
		return localError(codes.Internal, "the server sent %q in place of the file %q", file.GetName(), name)
	}
	if whole, err := t.holds(file); whole || err != nil {
		t.tell(file, file.GetNumBytes())
		return err
	}
	part, err := openPart(t.root, file)
	if err != nil {
		return err
	}
	defer part.close()
	for !part.complete() {
		t.tell(file, part.numBytes)
		message, err := stream.receive()
		if err != nil {
			return t.broken(err)
		}
		if err := part.receive(message.GetChunk()); err != nil {
			return err
		}
		t.retry.progress()
	}
	t.tell(file, part.numBytes)
	return part.finish()
}

func (t *transfer) broken(err error) error {
	if errors.Is(err, io.EOF) {
		return localError(codes.Unavailable, "the download ended before its last byte")
	}
	return t.client.translated(t.ctx, err)
}

// holds tells whether the whole file is here already.
func (t *transfer) holds(file *pb.ArtifactFile) (bool, error) {
	digest, size, err := hashed(t.root, file.GetName())
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if size == file.GetNumBytes() && digest == file.GetSha256() {
		return true, nil
	}
	if !t.options.Overwrite {
		path := filepath.Join(t.root.Name(), filepath.FromSlash(file.GetName()))
		return false, &fs.PathError{Op: "download", Path: path, Err: fs.ErrExist}
	}
	return false, nil
}

func (t *transfer) asking(names []string, offset int64) *pb.DownloadArtifactRequest {
	request := proto.Clone(t.request).(*pb.DownloadArtifactRequest)
	request.Names, request.Offset = names, offset
	return request
}

func (t *transfer) tell(file *pb.ArtifactFile, done int64) {
	if t.options.OnProgress != nil {
		t.options.OnProgress(DownloadProgress{file.GetName(), done, file.GetNumBytes()})
	}
}
