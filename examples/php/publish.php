<?php
// Publishes one event: php publish.php SUBJECT DATA
declare(strict_types=1);

$url = getenv('TIDEGATE_URL') ?: 'http://127.0.0.1:8080';

/** Returns the event's id. Retries with one idempotency key, so that the event is stored once. */
function publish(string $url, string $subject, string $data): string
{
    $key = bin2hex(random_bytes(16));
    for ($attempt = 0; $attempt < 5; $attempt++) {
        $context = stream_context_create(['http' => [
            'method' => 'POST',
            'header' => "Idempotency-Key: $key\r\nContent-Type: application/octet-stream",
            'content' => $data,
            'ignore_errors' => true,
            'timeout' => 10,
        ]]);
        $answer = @file_get_contents("$url/events/$subject", false, $context);
        $status = $answer === false ? 0 : (int) explode(' ', $http_response_header[0])[1];
        if ($status === 201) {
            return json_decode($answer, true, flags: JSON_THROW_ON_ERROR)['id'];
        }
        if ($status >= 400 && $status < 500 && $status !== 429) {
            throw new RuntimeException($answer);
        }
        usleep(200_000 * 2 ** $attempt);
    }
    throw new RuntimeException('the event may or may not be stored');
}

echo publish($url, $argv[1], $argv[2]), "\n";
