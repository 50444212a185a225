"""A Hub on loopback that answers the unmodified client: repositories in memory, large files from a second origin

It has what a push, a pull, a tag and a pull request ask for, and faults that are set from a test. Large files are
served by a listener of their own, as the Hub's redirects go to another host, so that a test sees that no token goes
there.
"""
import base64
import hashlib
import json
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = 'hf_aTokenThatMustNotLeak'
NOW = '2020-01-01T00:00:00.000Z'


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits, the newest last, each a mapping of paths to contents; names of branches and tags."""
    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = 'main') -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((oid, files))
        self.refs[ref] = oid
        return oid

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit[0] == oid), None)


class FakeHub:
    """The servers. `faults` maps (method, part of the path) to a list of what to do, one for each request:

    a status, 'cut' (the connection ends in the middle of a body), or None for nothing.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str, dict[str, str]]] = []  # origin, method, path, headers
        self.faults: dict[tuple[str, str], list[int | str | None]] = {}
        self.closed = False
        self.servers = []
        for origin in ('hub', 'lfs'):
            handler = type('Handler', (_Handler,), {'hub': self, 'origin': origin})
            server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
            self.servers.append(server)
        self.url, self.lfs_url = (f'http://127.0.0.1:{server.server_port}' for server in self.servers)

    def close(self) -> None:
        self.closed = True
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def calls(self, method: str, part: str = '') -> list[str]:
        """Paths that were asked for."""
        return [path for _, called, path, _ in self.requests if called == method and part in path]

    def environment(self, home) -> dict[str, str]:
        """Environment of a process that takes this for the Hub, with a cache of its own."""
        return {
            'HF_ENDPOINT': self.url, 'HF_HOME': str(home), 'HF_HUB_CACHE': str(home / 'hub'),
            'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1',
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: FakeHub
    origin: str

    def log_message(self, *args) -> None:
        pass

    def send(self, status: int, content=b'', headers=(), code: str = '', message: str = '') -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if code:
            self.send_header('X-Error-Code', code)
        if message:
            self.send_header('X-Error-Message', message)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        if 'Content-Length' not in dict(headers):
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self) -> None:
        if self.hub.closed:  # of a connection that is still open
            return self.cut()
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), {key: value[-1] for key, value in parse_qs(url.query).items()}
        self.hub.requests.append((self.origin, self.command, path, dict(self.headers)))
        length = int(self.headers.get('Content-Length') or 0)
        fault = next((
            queue.pop(0) for (method, part), queue in self.hub.faults.items()
            if queue and method == self.command and part in f'{self.origin}{path}'), None)
        if fault == 'cut' and self.command == 'PUT':
            self.rfile.read(length // 2)
            return self.cut()
        body = self.rfile.read(length)
        if isinstance(fault, int):
            return self.send(fault, {'error': f'fault {fault}'}, {'Retry-After': '0'} if fault == 429 else {})
        try:
            if self.origin == 'lfs':
                return self.lfs(path, body, fault)
            return self.api(path, body, fault)
        except Exception:  # a fault of this file is shown at once; a 5xx would be tried again
            return self.send(400, {'error': traceback.format_exc()})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def user(self) -> str | None:
        given = self.headers.get('Authorization')
        return 'user' if given == f'Bearer {TOKEN}' else None

    def lfs(self, path: str, body: bytes, fault) -> None:
        oid = path.rsplit('/', 1)[-1]
        if self.command == 'PUT':
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.blobs[oid] = body
            return self.send(200)
        content = self.hub.blobs[oid]
        start = int((self.headers.get('Range') or 'bytes=0-').removeprefix('bytes=').split('-')[0])
        part = content[start:]
        if fault == 'cut':
            self.send_response(206 if start else 200)
            self.send_header('Content-Length', str(len(part)))
            self.end_headers()
            self.wfile.write(part[:len(part) // 2])
            self.wfile.flush()
            return self.cut()
        if fault == 'other':  # as many bytes, but not these
            part = bytes(len(part))
        return self.send(206 if start else 200, part)

    def api(self, path: str, body: bytes, fault) -> None:
        repositories = self.hub.repositories
        if path == '/api/repos/create':
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if self.user() is None:
                return self.send(401, {'error': 'Invalid username or password.'})
            if not name.startswith('user/'):
                return self.send(403, {'error': 'You do not have the rights to create a model under this namespace'})
            url = {'url': f'{self.hub.url}/{name}'}
            if name in repositories:
                return self.send(409, {**url, 'error': 'You already created this model repo'})
            repositories[name] = Repository(private=asked.get('visibility') == 'private')
            repositories[name].commit({'.gitattributes': b'*.safetensors filter=lfs\n'})
            return self.send(200, url)
        if path == '/api/repos/delete':
            asked = json.loads(body)
            del repositories[f"{asked.get('organization') or 'user'}/{asked['name']}"]
            return self.send(200)
        if path == '/api/validate-yaml':
            return self.send(200, {'errors': [], 'warnings': []})
        if path.startswith('/api/models/'):
            user, name, *rest = path.removeprefix('/api/models/').split('/')
        else:
            user, name, *rest = path.removeprefix('/').replace('.git/info/lfs', '/lfs').split('/')
        repo = repositories.get(f'{user}/{name}')
        if repo is None or (repo.private and self.user() is None):
            return self.send(404 if self.user() else 401, {}, code='RepoNotFound', message='Repository not found')
        if rest[:1] in (['resolve'], ['revision'], ['tree'], ['commit'], ['preupload']):
            revision = rest[1]
            if repo.find(revision) is None:
                return self.send(404, {}, code='RevisionNotFound', message=f'Invalid rev id: {revision}')
        return getattr(self, f"api_{rest[0] if rest else 'info'}".replace('-', '_'))(f'{user}/{name}', repo, rest, body)

    def api_info(self, name: str, repo: Repository, rest: list[str], body: bytes) -> None:
        found = repo.find(rest[1] if rest else 'main')
        assert found
        oid, files = found
        self.send(200, {
            'id': name, 'sha': oid, 'author': 'user', 'private': repo.private, 'tags': [], 'lastModified': NOW,
            'createdAt': NOW, 'siblings': [{'rfilename': path} for path in sorted(files)],
        })

    api_revision = api_info

    def api_resolve(self, name: str, repo: Repository, rest: list[str], body: bytes) -> None:
        found = repo.find(rest[1])
        assert found
        oid, files = found
        path = '/'.join(rest[2:])
        commit = {'X-Repo-Commit': oid}
        if repo.gated:
            return self.send(403, {}, commit, code='GatedRepo', message=f'Access to model {name} is restricted')
        if path not in files:
            return self.send(404, {}, commit, code='EntryNotFound', message='Entry not found')
        content = files[path]
        sha = hashlib.sha256(content).hexdigest()
        if path.endswith('.safetensors'):
            self.hub.blobs[sha] = content
            return self.send(302, b'', {
                **commit, 'X-Linked-Etag': f'"{sha}"', 'X-Linked-Size': str(len(content)),
                'Location': f'{self.hub.lfs_url}/objects/{sha}'})
        headers = {**commit, 'ETag': f'"{git_sha1(content)}"'}
        if self.command == 'HEAD':
            return self.send(200, b'', {**headers, 'Content-Length': str(len(content))})
        return self.send(200, content, headers)

    def api_preupload(self, name: str, repo: Repository, rest: list[str], body: bytes) -> None:
        found = repo.find(rest[1])
        assert found
        files = []
        for asked in json.loads(body)['files']:
            path, lfs = asked['path'], asked['path'].endswith('.safetensors')
            row = {'path': path, 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False}
            if path in found[1]:
                row['oid'] = hashlib.sha256(found[1][path]).hexdigest() if lfs else git_sha1(found[1][path])
            files.append(row)
        self.send(200, {'files': files})

    def api_lfs(self, name: str, repo: Repository, rest: list[str], body: bytes) -> None:
        objects = []
        for asked in json.loads(body)['objects']:
            row = dict(asked)
            if asked['oid'] not in self.hub.blobs:
                row['actions'] = {'upload': {'href': f"{self.hub.lfs_url}/objects/{asked['oid']}", 'header': {}}}
            objects.append(row)
        self.send(200, {'transfer': 'basic', 'objects': objects}, {'Content-Type': 'application/vnd.git-lfs+json'})

    def api_commit(self, name: str, repo: Repository, rest: list[str], body: bytes) -> None:
        if self.user() is None:
            return self.send(403, {'error': 'Forbidden'})
        head, files = repo.find(rest[1])  # type: ignore[misc]
        files, pull_request = dict(files), self.query.get('create_pr') == '1'
        for line in body.splitlines():
            row = json.loads(line)
            key, value = row['key'], row['value']
            if key == 'header' and value.get('parentCommit') not in (None, head):
                return self.send(412, {'error': 'A commit has happened since. Please refresh and try again.'})
            if key == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif key == 'lfsFile':
                files[value['path']] = self.hub.blobs[value['oid']]
            elif key == 'deletedFile':
                del files[value['path']]
        number = sum(ref.startswith('refs/pr/') for ref in repo.refs) + 1
        oid = repo.commit(files, f'refs/pr/{number}' if pull_request else rest[1])
        answer = {'commitUrl': f'{self.hub.url}/{name}/commit/{oid}', 'commitOid': oid}
        if pull_request:
            answer['pullRequestUrl'] = f'{self.hub.url}/{name}/discussions/{number}'
        return self.send(200, answer)

    def api_tag(self, name: str, repo: Repository, rest: list[str], body: bytes) -> None:
        tag = json.loads(body)['tag']
        if tag in repo.tags:
            return self.send(409, {'error': 'Tag reference exists already'})
        found = repo.find('/'.join(rest[1:]))
        assert found
        repo.tags[tag] = found[0]
        return self.send(200)

    def api_refs(self, name: str, repo: Repository, rest: list[str], body: bytes) -> None:
        rows = {
            kind: [{'name': ref, 'ref': f'refs/{kind}/{ref}', 'targetCommit': oid} for ref, oid in refs.items()]
            for kind, refs in (('branches', repo.refs), ('tags', repo.tags))}
        self.send(200, {**rows, 'converts': []})
